"""`specengine chat`: a conversation at a terminal, or line by line from a pipe."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from specengine.cli.exits import complain
from specengine.cli.options import AsJson, takes
from specengine.cli.output import origin, print_json
from specengine.config import ChatOptions, EngineConfig, ModelOptions, SamplingParams
from specengine.errors import SpecEngineError
from specengine.kinds import check_text

if TYPE_CHECKING:
    from specengine.call import ChatCall
    from specengine.engine import Engine
    from specengine.outputs import GenerationResult

# An answer that ends in the middle of a sentence is no answer.
MAX_NEW_TOKENS = 1024
_FENCE = '"""'
_INTRODUCTION = [{"role": "user", "content": "Hello"}]


@takes(
    ModelOptions,
    SamplingParams,
    ChatOptions,
    EngineConfig,
    defaults={"max_new_tokens": MAX_NEW_TOKENS},
    open_defaults=("max_new_tokens",),
)
def chat(
    options: dict[str, Any],
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="what the model is told before the conversation")
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats/--no-stats", help="a line on stderr after each answer: what it took")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Talk with a model. Answers go to stdout as they come, everything else to stderr.

    Ctrl-C stops an answer and keeps what was said; at the prompt it leaves, with exit code 130. Ctrl-D and /quit leave
    with 0. /help lists the commands. A message of several lines stands between two lines of three quotes. What is piped
    in is answered line by line. Where a conversation outgrows the model's context, the oldest messages are left out,
    never the system's, and a note says so.
    """
    if options.get("n", 1) != 1:
        raise ValueError(f"n must be 1 in a conversation, got {options['n']}")
    opening = [] if system is None else [{"role": "system", "content": check_text("system", system)}]

    from specengine.api import lease_engine
    from specengine.call import prepare_chat

    call = prepare_chat([*opening, *_INTRODUCTION], options)
    with lease_engine(call.call) as engine:
        talk = Talk(engine, call, opening, has_stats=stats, as_json=as_json)
        talk.run()


class Command(NamedTuple):
    """What a line that begins with a slash does. run gets what follows its name."""

    help: str
    run: Callable[[str], None]


class Talk:
    """A conversation, and what it needs of an engine.

    opening: the messages that a conversation begins with; /reset leaves them
    """

    def __init__(
        self,
        engine: Engine,
        call: ChatCall,
        opening: list[dict[str, str]],
        *,
        has_stats: bool,
        as_json: bool,
    ) -> None:
        from specengine.cli.terminal import wants_color

        self._engine = engine
        self._sampling = dict(call.sampling)
        self._opening = opening
        self._messages = list(opening)
        self._has_stats = has_stats
        self._as_json = as_json
        self._is_interactive = sys.stdin.isatty()
        self._is_dim = wants_color("auto", sys.stderr)
        self._num_repeated = 0
        self._is_over = False
        advised = engine.advised_sampling(self._sampling)
        if "max_new_tokens" not in {**advised, **self._sampling}:
            self._sampling["max_new_tokens"] = MAX_NEW_TOKENS
        self._advised = advised
        self._commands = {
            "/help": Command("this list", self._help),
            "/reset": Command("begin anew; what the system says stays", self._reset),
            "/system": Command(
                "TEXT: what the model is told from now on; without TEXT nothing", self._system
            ),
            "/regenerate": Command("another answer to the last message", self._regenerate),
            "/save": Command("FILE: write the conversation as JSON", self._save),
            "/quit": Command("leave", self._quit),
        }

    def run(self) -> None:
        """Until it is left. Raises KeyboardInterrupt for Ctrl-C at the prompt."""
        if self._is_interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401, from now on `input` has line editing and a history
            draft = self._engine.draft_name
            self._note(f"{self._engine.target_name}{f', drafts: {draft}' if draft else ''}; /help for help")
        self._introduce_defaults()
        while not self._is_over and (line := self._read_line("> ")) is not None:
            if line.startswith("/"):
                self._obey(line)
            elif text := self._rest_of(line).strip("\n"):
                self._ask(text)

    # -- what is typed ----------------------------------------------------------------------------------------

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name in self._commands:
            self._commands[name].run(rest.strip())
        else:
            self._fail(ValueError(f"{name} is no command: {', '.join(self._commands)}"))

    def _rest_of(self, line: str) -> str:
        """A message from its first line on: that line, or what stands between two fences."""
        if not line.startswith(_FENCE):
            return line.strip()
        lines = [line.removeprefix(_FENCE)]
        while not lines[-1].endswith(_FENCE) and (more := self._read_line("… ")) is not None:
            lines.append(more)
        return "\n".join(lines).removesuffix(_FENCE)

    def _read_line(self, prompt: str) -> str | None:
        """A line without its end; None when there are no more."""
        if self._is_interactive and sys.stdout.isatty():
            try:
                return input(prompt)
            except EOFError:
                sys.stdout.write("\n")
                return None
        if self._is_interactive:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    # -- commands ---------------------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        for name, command in self._commands.items():
            self._note(f"{name:<12} {command.help}")
        self._note(f"{_FENCE:<12} begins and ends a message of several lines")
        self._note("Ctrl-C       stops an answer; at the prompt it leaves, as Ctrl-D does")

    def _reset(self, _: str) -> None:
        self._messages = list(self._opening)

    def _system(self, text: str) -> None:
        self._opening = [{"role": "system", "content": text}] if text else []
        rest = [each for each in self._messages if each["role"] != "system"]
        self._messages = [*self._opening, *rest]

    def _regenerate(self, _: str) -> None:
        if not self._messages or self._messages[-1]["role"] != "assistant":
            self._fail(ValueError("/regenerate: nothing was answered yet"))
            return
        said = self._messages.pop()
        self._num_repeated += 1
        if not {**self._advised, **self._sampling}.get("temperature"):
            self._note("at temperature 0 the answer is the same again; --temperature 0.7 samples")
        if not self._answer():
            self._messages.append(said)

    def _save(self, path: str) -> None:
        if not path:
            self._fail(ValueError("/save needs a file: /save FILE"))
            return
        content = {"model": self._engine.target_name, "messages": self._messages}
        try:
            Path(path).expanduser().write_text(
                json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
            )
        except OSError as error:
            self._fail(error)
            return
        self._note(f"wrote {len(self._messages)} messages to {path}")

    def _quit(self, _: str) -> None:
        self._is_over = True

    # -- answers ----------------------------------------------------------------------------------------------

    def _ask(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        self._num_repeated = 0
        if not self._answer():
            self._messages.pop()

    def _answer(self) -> bool:
        """Answers the last message, and adds what was said; whether anything was."""
        from specengine.runtime.sequence import SMOOTH_STREAM_INTERVAL

        said: list[str] = []
        result = None
        try:
            self._make_room()
            events = self._engine.stream_chat(
                self._messages, stream_interval=SMOOTH_STREAM_INTERVAL, **self._sampling_now()
            )
            with closing(events):
                for event in events:
                    said.append(event.text_delta)
                    self._show(event.text_delta)
                    result = event.result or result
        except KeyboardInterrupt:
            if not self._is_interactive:
                raise
        except (SpecEngineError, ValueError) as error:
            self._fail(error)
            return False
        self._finish(result)
        text = "".join(said)
        if result is not None or text:
            self._messages.append({"role": "assistant", "content": text})
        return result is not None or bool(text)

    def _show(self, text: str) -> None:
        if not self._as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def _finish(self, result: GenerationResult | None) -> None:
        """What comes after an answer; result: None where it was stopped."""
        self._show("\n")
        if result is None:
            self._note("stopped")
            return
        if self._as_json:
            print_json({"text": result.text, **result.to_dict(), **origin(self._engine)})
            sys.stdout.flush()
        elif self._has_stats:
            self._note(describe(result))
        if (error := result.outputs[0].error) is not None:
            self._fail(SpecEngineError(error))

    def _sampling_now(self) -> dict[str, Any]:
        """With a seed, another answer needs another one."""
        seed = self._sampling.get("seed")
        if seed is None or not self._num_repeated:
            return self._sampling
        return {**self._sampling, "seed": (seed + self._num_repeated) % 2**64}

    def _make_room(self) -> None:
        """Leaves out the oldest messages of a conversation that has too little room for an answer, until it fills half
        of the context, so that not every turn leaves out some: then the model reads all that is left anew."""
        context = self._engine.max_seq_len
        room = min({**self._advised, **self._sampling}["max_new_tokens"], context // 4)
        if self._length(self._messages) + room <= context:
            return
        num_opening, kept = len(self._opening), list(self._messages)
        while self._length(kept) > context // 2 and (rest := kept[num_opening:])[1:]:
            # A message with its answer, so that the roles go on taking turns.
            next_turn = next((i for i, each in enumerate(rest[1:], 1) if each["role"] == "user"), None)
            if next_turn is None:
                break
            kept = [*kept[:num_opening], *rest[next_turn:]]
        if num_left_out := len(self._messages) - len(kept):
            self._note(
                f"the conversation outgrew the context of {context} tokens: its {num_left_out} oldest messages are "
                "left out from now on"
            )
            self._messages = kept

    def _length(self, messages: list[dict[str, str]]) -> int:
        template = self._sampling.get("chat_template")
        return len(self._engine.apply_chat_template(messages, chat_template=template))

    # -- notes ------------------------------------------------------------------------------------------------

    def _introduce_defaults(self) -> None:
        if self._advised:
            listed = ", ".join(f"{name}={value!r}" for name, value in self._advised.items())
            self._note(f"from generation_config.json: {listed}")

    def _note(self, text: str) -> None:
        sys.stdout.flush()
        sys.stderr.write(f"\x1b[2m{text}\x1b[0m\n" if self._is_dim else f"{text}\n")
        sys.stderr.flush()

    def _fail(self, error: Exception) -> None:
        """At a terminal the conversation goes on; where nobody is there to see it, it ends."""
        if not self._is_interactive:
            raise error
        sys.stdout.flush()
        complain(str(error))


def describe(result: GenerationResult) -> str:
    """What an answer took, in a line."""
    metrics, output = result.metrics, result.outputs[0]
    speculation = metrics.speculative_decoding
    speed = f"first token after {metrics.time_to_first_token:.2f} s"
    if metrics.num_generated_tokens > 1 and metrics.decode_time > 0:
        speed += f", then {(metrics.num_generated_tokens - 1) / metrics.decode_time:.0f} tokens/s"
    parts = [f"{metrics.num_generated_tokens} tokens", speed]
    if speculation.num_draft_tokens:
        share = f"{speculation.draft_acceptance_rate:.0%} of {speculation.num_draft_tokens} drafts accepted"
        parts.append(f"{share}, {speculation.mean_acceptance_length:.2f} tokens a round")
    parts.append(f"prompt of {metrics.num_prompt_tokens} tokens, {metrics.num_cached_tokens} of them reused")
    if output.finish_reason == "length":
        parts.append("cut: --max-new-tokens allows more, or the context is full")
    return "; ".join(parts)
