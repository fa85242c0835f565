#!/usr/bin/env bash
# Scores a served model with EleutherAI's evaluation harness, without drafts and with them: the same figures.
#
#     pip install "lm-eval[api]" transformers
#     specengine serve --model smollm2 --draft-model suffix
#     examples/serving/evaluation.sh smollm2 HuggingFaceTB/SmolLM2-135M-Instruct --tasks gsm8k --limit 20
#
# The model as the server calls it, its tokenizer, and what lm_eval is told. OPENAI_BASE_URL names another server.
set -euo pipefail

model="$1"
tokenizer="$2"
shift 2
url="${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}/completions"
export OPENAI_API_KEY="${OPENAI_API_KEY:-none}"

for drafts in 0 4; do
    echo "num_speculative_tokens=$drafts"
    lm_eval --model local-completions --batch_size 4 \
        --model_args "model=$model,base_url=$url,tokenizer=$tokenizer,tokenizer_backend=huggingface" \
        --gen_kwargs "num_speculative_tokens=$drafts" "$@"
done
