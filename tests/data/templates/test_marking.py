"""Marks added to chat templates of the shapes that models carry, and templates that must be refused."""

import pytest

from llava_train.data.templates.fit import resolve_template, stop_token
from llava_train.data.templates.marking import PROBES, add_marks, answer_spans, rendering
from llava_train.data.templates.template import declared, load_template, portable, strip_marks, template_names
from llava_train.errors import DataError
from tests.data.templates.test_template import CHATML, GEMMA, LLAMA3, MESSAGES, PHI3, labelled, tokenizer_with

SHAPES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml, default system": "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' ~ m['role'] ~ '\n' ~ m['content'] ~ "
    "'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml, tools": """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n' }}{{- call | tojson }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "chatml, an answer in two": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}"
    "{{ m.content }}{% endif %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml in plain text": "{% for m in messages %}\n<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}\n{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}\n",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "llama3, plain stop": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = "
    "messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + "
    "m['content'] %}{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + "
    "' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "gemma, parts": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set opening = messages[0]['content'] + '\n\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set opening = "" -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (opening if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {{ item['text'] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
""",
    "phi3": "{% for m in messages %}{% if m['role'] == 'system' and m['content'] %}{{'<|system|>\n' + m['content'] + "
    "'<|end|>\n'}}{% elif m['role'] == 'user' %}{{'<|user|>\n' + m['content'] + '<|end|>\n'}}"
    "{% elif m['role'] == 'assistant' %}{{'<|assistant|>\n' + m['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "zephyr": "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|who|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|rule|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|me|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|me|>' }}\n{% endif %}\n{% endfor %}",
}
STOPS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
REFUSED = {
    "earlier answers are dropped": (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
        "'<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT,
        "earlier turns change",
    ),
    "the prompt changes with the turns": (
        "{{ messages | length }}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT,
        "earlier turns change",
    ),
    "a last answer with thoughts": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role == 'assistant' %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT,
        "after the prompt it writes '<think>",
    ),
    "no answer": (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}",
        "where the answer 'It is a cat.' should stand",
    ),
    "no prompt for the answer": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
        "after the prompt it writes '<|im_start|>assistant",
    ),
    "no stop": (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' }}{{ m.content }}{{ ' A:' if m.role == 'user' else '\n' }}"
        "{% endfor %}",
        "no control token of the tokenizer follows the answer",
    ),
    "all in one piece": (
        "{% set all = namespace(text='') %}{% for m in messages %}"
        "{% set all.text = all.text + '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' %}"
        "{% endfor %}{{ all.text }}" + PROMPT,
        "'all.text' writes more than an answer",
    ),
    "written by a macro": (
        "{% macro turn(m) %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endmacro %}"
        "{% for i in range(messages | length) %}{{ turn(messages[i]) }}{% endfor %}" + PROMPT,
        "lets '' be marked, where the answers are 'It is a cat.<|im_end|>'",
    ),
    "text that looks at itself": (
        "{% for m in messages %}{% set said %}{{ m.content }}{% endset %}{{ '<|im_start|>' + m.role + '\n' + "
        "said[:99] + '<|im_end|>\n' }}{{ said | length }}{% endfor %}" + PROMPT,
        "cannot be traced",
    ),
    "not Jinja": ("{% for %}", "cannot be rendered"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with([*CHATML, *LLAMA3, *GEMMA, *PHI3])


def probes_of(template: str, tokenizer) -> list:
    """The conversations the template takes."""
    try:
        rendering(template, tokenizer, PROBES[-1])
    except DataError:
        return list(PROBES[:-1])
    return list(PROBES)


@pytest.mark.parametrize("shape", SHAPES)
def test_marks_hold_the_answers_and_change_nothing(tokenizer, shape: str) -> None:
    template = SHAPES[shape]
    marked = add_marks(template, tokenizer)
    stop = STOPS.get(shape.split(",")[0].split(" ")[0], "</s>")
    assert strip_marks(marked) == template
    assert add_marks(marked, tokenizer) == marked
    assert stop_token(marked, tokenizer) == stop_token(template, tokenizer) == stop
    for messages in probes_of(template, tokenizer):
        text, spans = rendering(marked, tokenizer, messages)
        answers = [each["content"].strip() for each in messages if each["role"] == "assistant"]
        assert text == rendering(template, tokenizer, messages)[0]
        assert [text[a:b].removesuffix(stop).strip() for a, b in spans] == answers
        assert all(text[a:b].endswith(stop) for a, b in spans)


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_come_from_added_marks(shape: str) -> None:
    tokenizer = tokenizer_with([*CHATML, *LLAMA3, *GEMMA, *PHI3], own=SHAPES[shape])
    name, template = resolve_template("tokenizer", tokenizer)
    assert name == "tokenizer"
    stop = stop_token(template, tokenizer)
    assert [each.strip() for each in labelled(tokenizer, template, MESSAGES).split(stop)] == ["A cat.", "yes", ""]


@pytest.mark.parametrize("name", [n for n in template_names() if declared(load_template(n))["stop"] != "none"])
def test_added_marks_are_those_of_the_package(tokenizer, name: str) -> None:
    template = load_template(name)
    for source in (strip_marks(template), portable(template)):
        marked = add_marks(source, tokenizer)
        for messages in PROBES:
            assert rendering(marked, tokenizer, messages) == rendering(template, tokenizer, messages)
            assert rendering(marked, tokenizer, messages) == answer_spans(template, tokenizer, messages)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_proved_is_refused(case: str) -> None:
    template, why = REFUSED[case]
    tokenizer = tokenizer_with(CHATML, own=template)
    with pytest.raises(DataError) as caught:
        resolve_template("tokenizer", tokenizer)
    assert why in str(caught.value)
    assert "use data.template: chatml, or auto" in str(caught.value)


def test_the_default_of_several_templates_is_the_own_one() -> None:
    tokenizer = tokenizer_with(CHATML, own={"default": SHAPES["chatml"], "tool_use": "{{ tools }}"})
    assert strip_marks(resolve_template("tokenizer", tokenizer)[1]) == SHAPES["chatml"]
    assert resolve_template("auto", tokenizer)[0] == "chatml"
