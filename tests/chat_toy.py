"""A byte-level tokenizer with chat templates of published models, for tests.

The templates are short forms of the published ones, which write the same text for messages of plain
text; the tests name the source of each.
"""

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from sedd.data.tokenizers import BYTE_OF_CHARACTER, BYTE_ORDER, Pretrained, Turns

SPECIAL = (
    *("<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|mask|>"),
)
# LLaDA's own template begins an answer whether or not one is asked for.
LLADA = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Qwen3's: only the last answer shows its thoughts, an empty block if it has none.
QWEN3 = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def vocabulary(spare: int = 0) -> str:
    """The ``tokenizer.json`` of a tokenizer whose tokens are bytes, and special tokens."""
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(_characters())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL, *(f"<|reserved_token_{i}|>" for i in range(spare))])
    return backend.to_str()


def tokenizer(
    template: str | None, *, eos: str = "<|endoftext|>", spare: int = 0, **settings
) -> Pretrained:
    """The tokenizer with a chat template, settings of it, and some spare tokens."""
    variables = (("bos_token", "<|startoftext|>"), ("eos_token", eos), ("mask_token", "<|mask|>"))
    turns = Turns(template=template, variables=(*variables, *settings.items()))
    return Pretrained.of("toy", vocabulary(spare), turns=turns)


def _characters() -> list[str]:
    """GPT-2's characters of the 256 bytes, in the order of the bytes' ids."""
    character = {byte: c for c, byte in BYTE_OF_CHARACTER.items()}
    return [character[byte] for byte in BYTE_ORDER]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
