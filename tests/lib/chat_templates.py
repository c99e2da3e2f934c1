"""Chat templates of many kinds, written anew, each with what it makes of a turn: for tests of what is trained."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.lib.tokenizers import byte_tokenizer

SPECIAL = (
    "<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
)  # fmt: skip
"""Tokens of the tokenizer's own, beside its eos."""


@dataclass(frozen=True)
class Kind:
    """A template, and what it is to make of things."""

    template: str
    end: str
    """what ends a turn of the assistant"""
    header: str
    """what a prompt ends with"""
    blank: str = ""
    """what an answer begins with, before its text"""
    system: bool = True
    """whether it takes a system message"""
    strips: bool = False
    """whether it strips texts"""
    stops: bool = True
    """whether the end is one token"""
    alternates: bool = False
    """whether it refuses roles that do not alternate"""
    rewrites: bool = False
    """whether it drops the reasoning of earlier turns"""
    tools: bool = False
    """whether it writes tools, calls of them and what they return"""


_ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def _chatml(asked: str = _ASKED) -> str:
    return "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}" + asked


_ALTERNATE = "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
_QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% set c = m.content if m.content is string else '' %}"
    "{% set r = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or r) %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{{ c }}"
    "{% for call in m.tool_calls or [] %}{% if loop.first and c or not loop.first %}{{ '\n' }}{% endif %}"
    "{% set f = call.function if call.function else call %}"
    "{{ '<tool_call>\n{\"name\": \"' + f.name + '\", \"arguments\": ' + f.arguments | tojson + '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
_MARKED = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
_HEADER = "<|im_start|>assistant\n"

KINDS = {
    "ChatML": Kind(_chatml(), "<|im_end|>", _HEADER),
    "ChatML, marked": Kind(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + _MARKED + "{% else %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>", _HEADER,
    ),
    "ChatML that never begins an answer": Kind(_chatml(asked=""), "<|im_end|>", _HEADER),
    "ChatML that always begins an answer": Kind(_chatml(asked="{{ '<|im_start|>assistant\n' }}"), "<|im_end|>", _HEADER),
    "ChatML as text": Kind(
        _chatml(asked="{{ '<|im_start|>assistant\n' }}").replace("<|im_", "<|IM_"), "<|IM_end|>",
        "<|IM_start|>assistant\n", stops=False,
    ),
    "Llama 3": Kind(
        "{% for m in messages %}{% if loop.first %}{{ '<|begin_of_text|>' }}{% endif %}{{ '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", strips=True,
    ),
    "OLMo 2": Kind(
        "{{ '<|begin_of_text|>' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + '\n' }}"
        "{% elif m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '\n' }}{% elif m['role'] == 'assistant' %}"
        "{{ '<|assistant|>\n' + m['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        "<|end_of_text|>", "<|assistant|>\n",
    ),
    "Mistral": Kind(
        "{{ '<|begin_of_text|>' }}{% for m in messages %}" + _ALTERNATE + "{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        "<|end_of_text|>", "[/INST]", blank=" ", system=False, alternates=True,
    ),
    "Gemma": Kind(
        "{{ '<|begin_of_text|>' }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}" + _ALTERNATE + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
        "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>", "<start_of_turn>model\n", system=False, strips=True, alternates=True,
    ),
    "Zephyr": Kind(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        "<|end_of_text|>", "<|assistant|>\n",
    ),
    "Phi 3": Kind(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>", "<|assistant|>\n",
    ),
    "Qwen 3": Kind(_QWEN3, "<|im_end|>", _HEADER, rewrites=True, tools=True),
}  # fmt: skip


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """The small tokenizer with a chat template, and the tokens that templates are made of."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.chat_template = template
    return tokenizer
