"""The ops in plain PyTorch: the oracle that every kernel is tested against. Any device, any float dtype."""

from specengine.kernels.reference.begin_forward import begin_forward
from specengine.kernels.reference.begin_round import begin_round
from specengine.kernels.reference.block_verify import block_verify
from specengine.kernels.reference.commit_draws import commit_draws
from specengine.kernels.reference.commit_round import commit_round
from specengine.kernels.reference.embed import embed
from specengine.kernels.reference.expand_batch import expand_batch
from specengine.kernels.reference.filter_rows import filter_rows
from specengine.kernels.reference.head import head
from specengine.kernels.reference.head_draw import head_draw
from specengine.kernels.reference.head_stats import head_stats
from specengine.kernels.reference.linear_residual import linear_residual
from specengine.kernels.reference.match_draws import match_draws
from specengine.kernels.reference.match_verify import match_verify
from specengine.kernels.reference.norm_linear import norm_linear, quantize_groups, quantize_rows
from specengine.kernels.reference.norm_qkv import norm_qkv
from specengine.kernels.reference.paged_attention import paged_attention
from specengine.kernels.reference.parallel_linear_residual import parallel_linear_residual
from specengine.kernels.reference.parallel_norm_linear import parallel_norm_linear
from specengine.kernels.reference.plan_round import plan_round
from specengine.kernels.reference.rejection_verify import rejection_verify
from specengine.kernels.reference.row_keys import row_keys
from specengine.kernels.reference.sample_rows import sample_rows
from specengine.kernels.reference.stage_draft import stage_draft
from specengine.kernels.reference.threshold_verify import threshold_verify
from specengine.kernels.reference.token_logprobs import token_logprobs
from specengine.kernels.reference.transform_rows import transform_rows
from specengine.kernels.reference.typical_verify import typical_verify

__all__ = [
    "OPS",
    "begin_forward",
    "begin_round",
    "block_verify",
    "commit_draws",
    "commit_round",
    "embed",
    "expand_batch",
    "filter_rows",
    "head",
    "head_draw",
    "head_stats",
    "linear_residual",
    "match_draws",
    "match_verify",
    "norm_linear",
    "norm_qkv",
    "paged_attention",
    "parallel_linear_residual",
    "parallel_norm_linear",
    "plan_round",
    "quantize_groups",
    "quantize_rows",
    "rejection_verify",
    "row_keys",
    "sample_rows",
    "stage_draft",
    "threshold_verify",
    "token_logprobs",
    "transform_rows",
    "typical_verify",
]

# Every op of the engine: each has a Triton kernel, a test and a benchmark of the same name.
OPS = tuple(name for name in __all__ if name not in ("OPS", "quantize_groups", "quantize_rows"))
