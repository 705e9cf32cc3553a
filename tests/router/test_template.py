"""Chat templates render as `transformers` renders them, and cannot reach out of their sandbox."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from baton_common.errors import ConfigError, InvalidRequest
from baton_router.template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": "Hello é"},
    {"role": "user", "content": "Add"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "größer", "parameters": {"b": 1, "a": [2]}}}]

TEMPLATES = {
    "blocks": (
        "{{ bos_token }}\n{% for message in messages %}\n  {% if message['role'] == 'system' %}\n"
        "    [S]{{ message.content | trim }}\n  {% else %}\n[{{ message.role }}]{{ message.content }}{{ eos_token }}\n"
        "  {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\n[assistant]\n{% endif %}\n"
    ),
    "tools": (
        "{% if tools %}{{ tools | tojson }}\n{{ tools[0] | tojson(indent=2) }}{% endif %}{{ messages[-1].content }}"
    ),
    "loops": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{{ loop.index0 }}{{ m.content }}{% if ns.n == 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "extra": "{{ thinking | default('off') }}{{ messages[0]['content'][:2] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_equals_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    arguments: dict[str, Any] = {"thinking": "on"} if name == "extra" else {}
    theirs, _ = render_jinja_template(
        [MESSAGES], tools=TOOLS, chat_template=TEMPLATES[name], add_generation_prompt=True, **special, **arguments
    )
    ours = ChatTemplate(TEMPLATES[name], special).render(MESSAGES, tools=TOOLS, extra=arguments)
    assert ours == theirs[0]


def test_a_template_may_refuse_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render(MESSAGES)
    assert caught.value.param == "messages"


def test_a_failing_template_is_the_requests_error_not_a_crash() -> None:
    template = ChatTemplate("{{ messages[9].content.missing.deeper }}", {})
    with pytest.raises(InvalidRequest):
        template.render(MESSAGES)


def test_the_sandbox_holds() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
    with pytest.raises(InvalidRequest):
        template.render(MESSAGES)
    changing = ChatTemplate("{{ messages.append(1) }}", {})
    with pytest.raises(InvalidRequest):
        changing.render(MESSAGES)


def test_the_date_comes_from_the_clock() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: datetime(2026, 11, 21))
    assert template.render(MESSAGES) == "21 Nov 2026"


def test_a_broken_template_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="chat template"):
        ChatTemplate("{% if %}", {})
