"""One file a suite, each with ``run(config) -> Result``."""

SUITES: dict[str, str] = {
    "scan": "the selective scan, forward and backward, against mambapy, Hugging Face and its arithmetic",
    "first": "the first call of the scan, compiled and from the cache",
    "memory": "peak memory of the scan against its inputs, outputs and gradients",
    "conv": "causal convolution with SiLU against F.conv1d",
    "moe": "routed experts against a dense MLP of equal active FLOPs, and against Hugging Face",
    "step": "a training step against a Transformer, Hugging Face's Mamba and its own matrix products",
    "decode": "one token at a time against Hugging Face's generate, after short and long contexts",
    "tasks": "batches of the synthetic tasks against the training step that reads them",
    "long": "a million tokens in one pass: seconds and memory",
    "lengths": "time and memory of training and decoding against sequence length, drawn",
    "roofline": "bytes and FLOPs of the Triton kernels and what GPUs would need for them: calculated, not measured",
    "gpu": "the Triton kernels on this machine's GPU against mamba-ssm, flash-linear-attention and torch",
    "samplers": "searches on a table: which sampler and pruner find the best architectures for the fewest tokens",
    "fidelity": "rank correlation between early and full scores, on a table",
    "table": "builds a space's table, every architecture trained; hours, so never part of all",
}
