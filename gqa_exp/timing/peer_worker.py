"""T5GQA of the package grouped-query-attention-pytorch, in an environment of its own, for `peers.py`.

It imports nothing of ours, since that environment has a transformers of before 4.32:

    python -m venv /somewhere/t5gqa
    /somewhere/t5gqa/bin/pip install 'grouped-query-attention-pytorch[t5]' 'transformers<4.32' 'numpy<2'

Reads a number of tokens per line, and answers each with the generated ids as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Arguments: folder of the weights, file of the input ids, KV heads, dtype, threads."""
    folder, inputs, kv_heads, dtype, threads = sys.argv[1:]
    import torch
    import transformers
    from grouped_query_attention_pytorch.t5 import convert_t5_to_gqa

    torch.set_num_threads(int(threads))
    model: Any = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    model = convert_t5_to_gqa(model, kv_heads=int(kv_heads)).to(getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    input_ids = torch.tensor(json.loads(Path(inputs).read_text(encoding="utf-8")))
    print("ready", flush=True)
    for line in sys.stdin:
        with torch.inference_mode():
            ids = model.generate(input_ids=input_ids, max_new_tokens=int(line), do_sample=False, num_beams=1)
        print(json.dumps(ids[:, 1:].tolist()), flush=True)


if __name__ == "__main__":
    main()
