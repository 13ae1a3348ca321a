"""Peers that run in a process of their own, for `peers.py`.

T5GQA of the package grouped-query-attention-pytorch, since it needs a transformers of before 4.32:

    python -m venv /somewhere/t5gqa
    /somewhere/t5gqa/bin/pip install 'grouped-query-attention-pytorch[t5]' 'transformers<4.32' 'numpy<2'

And CTranslate2, since its threads and torch's would share one OpenMP: once both have run there are more of them than
cores, and none waits actively any more, which doubled the time of our steps.

It imports nothing of ours, which the first lacks. Reads a number of tokens per line, and answers each with the
generated ids as JSON.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Decode = Callable[[int], list[list[int]]]


def t5gqa(folder: Path, input_ids: list[list[int]], threads: int, kv_heads: str, dtype: str) -> Decode:
    """T5 of the folder with its attention replaced, and transformers' `generate`."""
    import torch
    import transformers
    from grouped_query_attention_pytorch.t5 import convert_t5_to_gqa

    torch.set_num_threads(threads)
    model: Any = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    model = convert_t5_to_gqa(model, kv_heads=int(kv_heads)).to(getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    inputs = torch.tensor(input_ids)

    def decode(tokens: int) -> list[list[int]]:
        with torch.inference_mode():
            ids = model.generate(input_ids=inputs, max_new_tokens=tokens, do_sample=False, num_beams=1)
        return ids[:, 1:].tolist()  # type: ignore[no-any-return]  # it begins with the start token

    return decode


def ctranslate2(folder: Path, input_ids: list[list[int]], threads: int, compute_type: str) -> Decode:
    """A folder that CTranslate2 has converted."""
    from ctranslate2 import Translator

    translator = Translator(
        str(folder), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads
    )
    vocabulary = json.loads((folder / "shared_vocabulary.json").read_text(encoding="utf-8"))
    index = {word: i for i, word in enumerate(vocabulary)}
    words = [[vocabulary[i] for i in row] for row in input_ids]
    settings = {"beam_size": 1, "max_input_length": 0, "disable_unk": False}

    def decode(tokens: int) -> list[list[int]]:
        lengths = {"min_decoding_length": tokens, "max_decoding_length": tokens}
        results = translator.translate_batch(words, **settings, **lengths)
        return [[index[word] for word in result.hypotheses[0]] for result in results]

    return decode


def main() -> None:
    """Arguments: the engine, folder of the weights, file of the input ids, threads, and what the engine asks for."""
    engine, folder, inputs, threads, *how = sys.argv[1:]
    input_ids = json.loads(Path(inputs).read_text(encoding="utf-8"))
    decode: Decode = {"T5GQA": t5gqa, "CTranslate2": ctranslate2}[engine](Path(folder), input_ids, int(threads), *how)  # type: ignore[operator]
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(decode(int(line))), flush=True)


if __name__ == "__main__":
    main()
