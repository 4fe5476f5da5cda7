"""The options of `tokenweave generate` that set an engine or sampling: each names a field, and says what it does."""

from __future__ import annotations

from tokenweave.cli.options import Option
from tokenweave.comm.choice import COMMS
from tokenweave.config import DEVICES, DTYPES, LOAD_FORMATS, OVERLAPS
from tokenweave.engine.attention import ATTENTIONS

MODEL = (
    Option(
        "tensor_parallel_size",
        "ranks to split the model over; a plain process starts them on this machine (default: 1, or all that torchrun "
        "started)",
        "N",
        short="tp",
    ),
    Option("dtype", "of weights and activations; auto: the checkpoint's own on CUDA, float32 on a CPU", choices=DTYPES),
    Option("device", "auto: CUDA where there is one", choices=DEVICES),
    Option(
        "attention",
        "flashinfer: its kernels, where it is installed; triton: our own; torch: plain operators, for a CPU; auto: on "
        "CUDA the first of these that is there",
        choices=ATTENTIONS,
    ),
    Option(
        "load_format",
        "auto: the model's safetensors; dummy: random weights, to measure a shape (tokenweave bench), for which "
        "config.json is enough",
        choices=LOAD_FORMATS,
    ),
    Option(
        "overlap",
        "off: plain all-reduce, the baseline; fused: sums in shards, batches not split; weave: two halves, one "
        "computes while the other's sum is on the wire; auto: what is measured to be fastest",
        choices=OVERLAPS,
    ),
    Option(
        "comm",
        "how fused and weave form their sums. multimem, peer: one kernel, through NVLink multicast or the peers' "
        "memory; sharded: reduce-scatter and all-gather; auto: the first of these that every rank can",
        choices=COMMS,
    ),
)

SAMPLING = (
    Option("temperature", "0 takes the likeliest token; more is more random", "T", default=0.0),
    Option("max_tokens", "most tokens to generate for a prompt; none: up to the model's length", "N", default=32),
    Option("min_tokens", "do not stop before this many tokens", "N"),
    Option("n", "completions of each prompt; more than one need a temperature > 0", "N"),
    Option("top_p", "sample from the likeliest tokens that together have this probability; 1: all", "P"),
    Option("top_k", "sample from the K likeliest tokens; 0: all", "K"),
    Option("min_p", "leave out tokens less likely than P times the likeliest; 0: none", "P"),
    Option("seed", "draw every prompt's tokens from this seed, whatever else runs", "SEED", name="request_seed"),
    Option("stop", "end a completion before this text; as often as needed", "TEXT"),
    Option(
        "stop_token_ids", "end a completion after this token; may be given several times", "ID", name="stop_token_id"
    ),
    Option("ignore_eos", "go on after the model's end-of-sequence token"),
    Option("include_stop_str_in_output", "keep the stop text in the completion", name="include_stop"),
    Option("skip_special_tokens", "show special tokens in the text"),
    Option("repetition_penalty", "> 1 makes tokens of prompt and completion less likely", "X"),
    Option("presence_penalty", "subtracted from the logits of tokens that the completion has", "X"),
    Option("frequency_penalty", "the same, once for each time that it has them", "X"),
    Option("logprobs", "report log-probabilities of the K likeliest tokens; shown by --json", "K"),
)

ENGINE = (
    Option("max_num_batched_tokens", "tokens of one step, prefill and decode together", "N"),
    Option("max_num_seqs", "sequences that run at once", "N"),
    Option("max_model_len", "most tokens of a prompt and its completion (default: what the model was made for)", "N"),
    Option("block_size", "tokens of one block of the KV cache", "N"),
    Option("num_kv_blocks", "blocks of the KV cache (default: by --gpu-memory-utilization; on a CPU, as needed)", "N"),
    Option(
        "gpu_memory_utilization",
        "share of a GPU's memory for weights, activations, CUDA graphs and KV cache; so much must be free at the start",
        "X",
    ),
    Option(
        "async_scheduling",
        "prepare and launch a step before the tokens of the last are known (default: on CUDA, where that hides the "
        "host's work)",
    ),
    Option("enforce_eager", "on CUDA: queue every step anew, without graphs"),
    Option(
        "cuda_graph_max_tokens",
        "on CUDA: the largest prefill step that is captured in a graph (default: while queueing it takes longer)",
        "N",
    ),
    Option("enable_prefix_caching", "do not reuse the keys and values of equal beginnings", name="prefix_caching"),
    Option("seed", "what prompts without --request-seed draw from", "SEED"),
    Option("timeout_s", "the bound on every wait for another rank", "SECONDS"),
)

OUTPUT = (
    Option(
        "trace",
        "write a timeline of all lanes for ui.perfetto.dev to FILE, a picture of it beside (.png), and say how much of "
        "the communication was hidden",
        "FILE",
    ),
    Option("progress", "no progress bars (there are none either where standard error is no terminal)"),
)
