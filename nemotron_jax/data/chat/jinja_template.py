"""The same format as `render`, as a Jinja template for libraries that apply one.

It goes along with a chat model that was trained here; nothing here executes it. Arguments of calls
must be objects: Jinja reads no JSON.
"""

from nemotron_jax.data.chat.tools import HEADING, INSTRUCTIONS

FILE_NAME = "chat_template.jinja"

_TEXT = r"""{#- Nemotron 3's chat format, as nemotron_jax renders it. -#}
{%- set enable_thinking = enable_thinking if enable_thinking is defined else true -%}
{%- set truncate_history_thinking = truncate_history_thinking
    if truncate_history_thinking is defined else true -%}
{%- set low_effort = low_effort if low_effort is defined else false -%}
{%- set medium_effort = medium_effort if medium_effort is defined else false -%}
{%- set reasoning_budget = reasoning_budget if reasoning_budget is defined else none -%}

{%- macro text_of(message) -%}
  {%- set content = message['content'] -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content is not none and content is not undefined -%}
    {%- for part in content -%}{{- part['text'] -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}

{%- macro written(value) -%}
  {%- if value is mapping or (value is sequence and value is not string) -%}
    {{- value | tojson -}}
  {%- else -%}
    {{- value -}}
  {%- endif -%}
{%- endmacro -%}

{%- macro others(fields, handled) -%}
  {%- for key, value in fields.items() if key not in handled -%}
    {{- '\n<' ~ key ~ '>' ~ written(value) ~ '</' ~ key ~ '>' -}}
  {%- endfor -%}
{%- endmacro -%}

{%- macro describe(function) -%}
  {{- '\n<function>\n<name>' ~ function['name'] ~ '</name>' -}}
  {%- if 'description' in function -%}
    {{- '\n<description>' ~ (function['description'] | trim) ~ '</description>' -}}
  {%- endif -%}
  {{- '\n<parameters>' -}}
  {%- set parameters = function['parameters'] -%}
  {%- if parameters is mapping and parameters['properties'] is mapping -%}
    {%- for name, fields in parameters['properties'].items() -%}
      {{- '\n<parameter>\n<name>' ~ name ~ '</name>' -}}
      {%- if 'type' in fields -%}
        {{- '\n<type>' ~ (fields['type'] | string) ~ '</type>' -}}
      {%- endif -%}
      {%- if 'description' in fields -%}
        {{- '\n<description>' ~ (fields['description'] | trim) ~ '</description>' -}}
      {%- endif -%}
      {%- if 'enum' in fields -%}
        {{- '\n<enum>' ~ (fields['enum'] | tojson) ~ '</enum>' -}}
      {%- endif -%}
      {{- others(fields, ['name', 'type', 'description', 'enum']) -}}
      {{- '\n</parameter>' -}}
    {%- endfor -%}
  {%- endif -%}
  {%- if parameters is mapping -%}
    {{- others(parameters, ['type', 'properties', 'required']) -}}
    {%- if 'required' in parameters -%}
      {{- '\n<required>' ~ (parameters['required'] | tojson) ~ '</required>' -}}
    {%- endif -%}
  {%- endif -%}
  {{- '\n</parameters>' -}}
  {{- others(function, ['type', 'name', 'description', 'parameters']) -}}
  {{- '\n</function>' -}}
{%- endmacro -%}

{%- macro assistant(message, past) -%}
  {%- set calls = message['tool_calls'] or [] -%}
  {%- set turn = namespace(text=text_of(message)) -%}
  {%- set reasoning = message['reasoning_content'] -%}
  {%- if reasoning is string and reasoning.strip() -%}
    {%- set turn.text = '<think>\n' ~ reasoning ~ '\n</think>\n' ~ turn.text -%}
  {%- elif '<think>' not in turn.text and '</think>' not in turn.text -%}
    {%- set turn.text = '<think></think>' ~ turn.text -%}
  {%- endif -%}
  {%- if past and calls -%}
    {%- if '</think>' in turn.text -%}
      {%- set rest = turn.text.split('</think>')[-1] -%}
    {%- else -%}
      {%- set rest = turn.text.split('<think>')[0] -%}
    {%- endif -%}
    {%- set turn.text = '<think></think>' ~ rest.strip() -%}
  {%- elif past and '<think>' in turn.text and '</think>' in turn.text -%}
    {%- set turn.text = '<think></think>' ~ turn.text.split('</think>')[-1] -%}
  {%- endif -%}
  {{- '<|im_start|>assistant\n' ~ turn.text.strip() -}}
  {%- if calls -%}{{- '\n' -}}{%- endif -%}
  {%- for call in calls -%}
    {%- set function = call['function'] if 'function' in call else call -%}
    {%- if function['arguments'] is string -%}
      {{- raise_exception('arguments of a call must be an object and not JSON text') -}}
    {%- endif -%}
    {{- '<tool_call>\n<function=' ~ function['name'] ~ '>\n' -}}
    {%- for key, value in (function['arguments'] or {}).items() -%}
      {{- '<parameter=' ~ key ~ '>\n' ~ written(value) ~ '\n</parameter>\n' -}}
    {%- endfor -%}
    {{- '</function>\n</tool_call>\n' -}}
  {%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endmacro -%}

{%- set has_system = messages[0]['role'] == 'system' -%}
{%- set rest = messages[1:] if has_system else messages -%}
{%- set system = text_of(messages[0]) if has_system else '' -%}
{%- set last = namespace(user=-1) -%}
{%- for message in rest -%}
  {%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>system\n' ~ system -}}
{%- if tools -%}
  {%- if system -%}{{- '\n\n' -}}{%- endif -%}
  {{- HEADING -}}
  {%- for tool in tools -%}
    {{- describe(tool['function'] if 'function' in tool else tool) -}}
  {%- endfor -%}
  {{- '\n</tools>' ~ INSTRUCTIONS -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- for message in rest -%}
  {%- if message['role'] == 'assistant' -%}
    {{- assistant(message, truncate_history_thinking and loop.index0 < last.user) -}}
  {%- elif message['role'] == 'tool' -%}
    {%- if loop.first or loop.previtem['role'] != 'tool' -%}
      {{- '<|im_start|>user\n' -}}
    {%- endif -%}
    {{- '<tool_response>\n' ~ text_of(message) ~ '\n</tool_response>\n' -}}
    {%- if loop.last or loop.nextitem['role'] != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
  {%- else -%}
    {{- '<|im_start|>' ~ message['role'] ~ '\n' ~ text_of(message) -}}
    {%- if loop.index0 == last.user -%}
      {%- if low_effort -%}{{- '\n\n{reasoning effort: low}' -}}{%- endif -%}
      {%- if medium_effort -%}{{- '\n\n{reasoning effort: efficient}' -}}{%- endif -%}
      {%- if reasoning_budget is not none -%}
        {{- '\n\n{thinking token budget: ' ~ reasoning_budget ~ '}' -}}
      {%- endif -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if enable_thinking -%}
    {{- '<|im_start|>assistant\n<think>\n' -}}
  {%- else -%}
    {{- '<|im_start|>assistant\n<think></think>' -}}
  {%- endif -%}
{%- endif -%}
"""


def chat_template() -> str:
    """The text of the template."""
    text = _TEXT
    for name, words in (("HEADING", HEADING), ("INSTRUCTIONS", INSTRUCTIONS)):
        text = text.replace(name, repr(words))
    return text
