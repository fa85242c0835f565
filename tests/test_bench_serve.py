"""The benchmark of the server: whom it asks for what, what its rows compare, and which promises it holds it to."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_serve
import gguf_files
import pytest
import tiny_models

# Answers as llama.cpp's does, as far as the benchmark reads it.
LLAMA = f"""#!{sys.executable}
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert int(given["--parallel"]) == 16 and int(given["--ctx-size"]) >= 16 * 70, given
print("system_info: n_threads = 1 | CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 |", flush=True)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = {{"choices": [{{"text": ""}}], "usage": {{"completion_tokens": body["max_tokens"]}}}}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


ThreadingHTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
"""


def test_each_is_asked_the_same_and_the_rows_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = gguf_files.write_gguf(
        tmp_path / "tiny.gguf",
        tiny_models.build_model("llama", vocab_size=320, max_positions=256),
        tokenizer=tiny_models.build_tokenizer(320),
    )
    llama, results = tmp_path / "llama-server", tmp_path / "rows.jsonl"
    llama.write_text(LLAMA, encoding="utf-8")
    llama.chmod(0o755)
    arguments = ["--gguf", str(model), "--llama-server", str(llama), "--quick", "--repetitions", "1"]
    status = bench_serve.main([*arguments, "--threads", "1", "--results", str(results)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    found = [(row["kind"], row["server"], row.get("mode"), row["clients"]) for row in rows]
    who = [("ours", "plain"), ("ours", "speculative"), ("llama.cpp", "plain")]
    assert found == [
        *(("clients", name, mode, num_clients) for num_clients in (1, 4, 16) for name, mode in who),
        *(("throughput", "ours", mode, 32) for mode in ("plain", "speculative")),
        ("first token", "ours", None, 1),
    ]
    assert all(row["processor"] and row["instruction_set"] for row in rows)
    assert {row["instruction_set"] for row in rows if row["server"] == "llama.cpp"} == {"SSE3 AVX2"}
    for ours, theirs in ((rows[i], rows[i // 3 * 3 + 2]) for i in (0, 1, 3, 4, 6, 7)):
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        assert ours["ratio_to_llama"] == pytest.approx(ratio, rel=0.05, abs=1e-3)
    for row in rows[9:11]:
        ratio = row["tokens_per_second"] / row["library_tokens_per_second"]
        assert row["ratio_to_library"] == pytest.approx(ratio, rel=0.01)
    assert rows[11]["extra_ms"] == pytest.approx(
        rows[11]["first_token_ms"] - rows[11]["library_first_token_ms"], abs=0.02
    )
    assert all(bench_serve.line_of(row) in shown.out for row in rows)


def test_other_tokens_than_without_drafts_are_no_result() -> None:
    turns = [bench_serve.Turn(1.0, 2, [[1, 2]])]
    bench_serve.check_same(turns, [bench_serve.Turn(3.0, 2, [[1, 2]])], "with drafts")
    with pytest.raises(bench_serve.NotExactError, match="with drafts"):
        bench_serve.check_same(turns, [bench_serve.Turn(1.0, 2, [[1, 3]])], "with drafts")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"mode": "plain", "ratio_to_library": 0.9}, None),
        ({"mode": "plain", "ratio_to_library": 0.89}, "plain: 0.89 of the library's throughput, not 0.9"),
        ({"extra_ms": 5.0}, None),
        ({"extra_ms": 5.1}, "the first token comes 5.1 ms after the library's, not 5.0"),
        ({"ratio_to_llama": 0.1}, None),
    ],
)
def test_what_is_promised(row: dict[str, Any], fault: str | None) -> None:
    assert bench_serve.fault_of(row) == fault


def test_a_server_that_ends_is_told(tmp_path: Path) -> None:
    with pytest.raises(bench_serve.UnavailableError, match="ended with status 3: no such model"):
        bench_serve.Server("llama.cpp", [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"])


def test_where_llamas_server_is_left_out_its_row_says_so(tmp_path: Path) -> None:
    given = SimpleNamespace(llama_server=Path("none"))
    assert bench_serve.start_llama(tmp_path, given) == (None, "left out")  # type: ignore[arg-type]
    row = {"kind": "clients", "server": "llama.cpp", "model": "m", "reason": "left out"}
    assert bench_serve.line_of(row) == "m, clients: llama.cpp: left out"
