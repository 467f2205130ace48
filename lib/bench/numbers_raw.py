"""vLLM as a user would call it, in a process of its own, on prompts of token ids: one line of JSON a measurement.

python -m lib.bench.numbers_raw FOLDER IDS.json MAX_TOKENS '{"LLM argument": value}' NAME=WORDS ...
WORDS: seeds (one a row), text (read from the tokens), adapter:FOLDER; by commas, or none."""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folder, ids, tokens, arguments, *measurements = sys.argv[1:]
    prompts = [{"prompt_token_ids": one} for one in json.loads(Path(ids).read_text())]
    began = time.perf_counter()
    llm = LLM(folder, max_model_len=512, **json.loads(arguments))
    print(json.dumps({"measured": "raw up", "s": round(time.perf_counter() - began, 1)}), flush=True)
    for measurement in measurements:
        name, _, said = measurement.partition("=")
        words = {word.partition(":")[0]: word.partition(":")[2] for word in said.split(",")}
        lora = LoRARequest("one", 1, words["adapter"]) if "adapter" in words else None
        params = [
            SamplingParams(
                temperature=1.0,
                max_tokens=int(tokens),
                ignore_eos=True,
                detokenize="text" in words,
                seed=row * 7919 + 12345 if "seeds" in words else None,
            )
            for row in range(len(prompts))
        ]
        llm.generate(prompts[:256], params[:256], use_tqdm=False, lora_request=lora)
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
        rate = round(len(prompts) / (time.perf_counter() - began), 1)
        print(json.dumps({"measured": name, "rows_per_s": rate}), flush=True)


if __name__ == "__main__":
    main()
