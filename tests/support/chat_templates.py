"""Chat templates of the kinds that published models have, shortened to what renders text."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA3 = (
    "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message.role + "
    "'<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Without a system message it writes one with dates only, as Llama 3.1 does.
LLAMA31 = (
    "{% set found = messages[0].content if messages[0].role == 'system' else '' %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n' + found + '<|eot_id|>' }}"
    "{% for message in messages if message.role != 'system' %}{{ '<|start_header_id|>' + message.role + "
    "'<|end_header_id|>\n\n' + message.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% set start = 1 if messages[0].role == 'system' else 0 %}"
    "{% for message in messages[start:] %}{% if message.role == 'user' %}{{ '[INST] ' }}"
    "{% if start and PLACE %}{{ messages[0].content + '\n\n' }}{% endif %}{{ message.content + '[/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_FIRST, MISTRAL_LAST = (_MISTRAL.replace("PLACE", f"loop.{place}") for place in ("first", "last"))
# As of Gemma and old Mistrals.
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
# As Qwen3 does: an answer has its thoughts only if it is the last.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EXPRESSIBLE = {
    "chatml": CHATML,
    "chatml with a default": CHATML_WITH_DEFAULT,
    "llama 3": LLAMA3,
    "llama 3.1": LLAMA31,
    "mistral, system first": MISTRAL_FIRST,
    "mistral, system last": MISTRAL_LAST,
    "no system": NO_SYSTEM,
    "thinking": THINKING,
}
NUMBERED = (
    "{% for message in messages %}{{ loop.index ~ '. ' + message.role + ': ' + message.content + '\n' }}{% endfor %}"
)
CONVERSATIONS = [
    [*system, *({"role": ("user", "assistant")[turn % 2], "content": f"turn {turn}\nναι"} for turn in range(length))]
    for system in ([], [{"role": "system", "content": "Answer in Greek."}])
    for length in (1, 3, 5)
]
