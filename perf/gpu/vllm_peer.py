"""vLLM's part of the throughput measurement, in a process of its own: requests on standard input, seconds on output."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    from vllm import LLM, SamplingParams

    given = json.load(sys.stdin)
    prompts = [{"prompt_token_ids": ids} for ids, _ in given["requests"]]
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for _, count in given["requests"]]
    llm = LLM(
        model=given["folder"],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=given["max_model_len"],
        enable_prefix_caching=False,
    )
    for params_of_run in (params, params):
        start_s = time.perf_counter()
        llm.generate(prompts, params_of_run, use_tqdm=False)
        seconds = time.perf_counter() - start_s
    print(seconds)


if __name__ == "__main__":
    main()
