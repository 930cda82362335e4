//! Rendering, and where the assistant speaks, with templates in the manner of well-known models.

mod python;

use super::*;
use crate::data::notes::Notes;

const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + \
    message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\n' }}{% endif %}";

/// As Qwen 3: thoughts stay after the last question alone, and an answer without any gets empty ones there.
const THINKING: &str = "{%- set ns = namespace(last=0) %}{%- for m in messages[::-1] %}\
    {%- if m.role == 'user' and ns.last == 0 %}{%- set ns.last = messages|length - 1 - loop.index0 %}{%- endif %}{%- endfor %}\
    {%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- set content = m.content %}{%- set thoughts = '' %}\
    {%- if m.role == 'assistant' %}{%- if m.reasoning_content is string %}{%- set thoughts = m.reasoning_content %}\
    {%- elif '</think>' in content %}{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}\
    {%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}\
    {%- if loop.index0 > ns.last %}{{- '<think>\n' + thoughts + '\n</think>\n\n' }}{%- endif %}{%- endif %}\
    {{- content + '<|im_end|>\n' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}";

/// As DeepSeek R1's distilled models: thoughts always go, and the model is asked to begin with some.
const FORGETFUL: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}\
    {% elif m.role == 'assistant' %}<A>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}\
    {% if add_generation_prompt %}<A><think>\n{% endif %}";

/// As Phi 3.5: an end token behind all that is not asked.
const ENDED: &str = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}";

/// As Mistral v0.3: the system turn stands before the last question while that is the last turn.
const LATE_SYSTEM: &str = "{{ '<s>' }}{% set system = '' %}{% if messages[0].role == 'system' %}\
    {% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}\
    {% for m in messages %}{% if m.role == 'user' %}[INST] {{ system if loop.last else '' }}{{ m.content }}[/INST]\
    {% else %} {{ m.content }}</s>{% endif %}{% endfor %}";

/// As Llama 3: the first turn is asked for.
const HEADERS: &str = "{% set first = messages[0]['role'] + '' %}{% for m in messages %}<h>{{ m.role }}</h>\n\n\
    {{ m.content | trim }}<eot>{% endfor %}{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}";

fn template_of(source: &str) -> ChatTemplate {
    let special = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, token)| (name.to_owned(), token.into()));
    let date = NaiveDate::from_ymd_opt(2026, 11, 27).unwrap();
    ChatTemplate::new(source, special.into_iter().collect(), TemplateDate::OfRun(date)).unwrap()
}

fn of_turns(turns: impl IntoIterator<Item = Message>) -> Conversation {
    Conversation { turns: turns.into_iter().collect(), ..Conversation::default() }
}

fn chat(turns: &[(&str, &str)]) -> Conversation {
    of_turns(turns.iter().enumerate().map(|(i, (role, content))| turn(i, json!({"role": role, "content": content}))))
}

fn turn(i: usize, fields: Value) -> Message {
    Message::from_fields(&format!("messages[{i}]"), fields.as_object().unwrap().clone(), None)
}

fn long() -> Conversation {
    chat(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
}

/// The text, and what of it is said.
fn rendered(source: &str, conversation: &Conversation) -> Result<(String, Vec<String>), String> {
    let rendered = template_of(source).conversation(conversation, &mut Notes::default())?;
    let said = rendered.spans.iter().map(|span| rendered.text[span.clone()].to_owned()).collect();
    Ok((rendered.text, said))
}

fn said(source: &str, conversation: &Conversation) -> Vec<String> {
    rendered(source, conversation).unwrap().1
}

fn error(source: &str, conversation: &Conversation) -> String {
    rendered(source, conversation).unwrap_err()
}

fn text(source: &str, conversation: &Conversation) -> String {
    template_of(source).render(conversation, &conversation.turns, false).unwrap()
}

#[test]
fn the_assistant_says_what_comes_after_that_with_which_it_is_asked() {
    assert_eq!(said(CHATML, &long()), ["b<|im_end|>\n", "d<|im_end|>\n"]);
    let asked = template_of(CHATML).prompt(&long().turns[..1]).unwrap();
    assert_eq!(asked, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn generation_tags_mark_what_the_assistant_says_and_leave_no_trace() {
    let source = "{%- for m in messages %}\n{%- if m.role == 'assistant' %}\n[{% generation %}\n{{ m.content }}!\
        {%- endgeneration -%}  ]\n{%- else %}<{{ m.content }}>{% endif %}\n{%- endfor %}";
    let plain = source.replace("{% generation %}\n", "").replace("{%- endgeneration -%}  ", "");
    let (marked, said) = rendered(source, &long()).unwrap();
    assert_eq!(said, ["b!", "d!"]);
    assert_eq!(marked, text(&plain, &long()));
}

#[test]
fn only_turns_that_are_to_be_learned_have_spans() {
    let marked = "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }};\
        {% endgeneration %}{% else %}U:{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}";
    for (source, expected) in
        [(CHATML, "d<|im_end|>\n"), (marked, "d;"), (THINKING, "<think>\n\n</think>\n\nd<|im_end|>\n")]
    {
        for given in [2, 3] {
            let (written, said) = rendered(source, &Conversation { given, ..long() }).unwrap();
            assert_eq!(said, [expected], "{given} turns given");
            assert_eq!(written, text(source, &long()).replace(SENTINELS, ""));
        }
        let mut excluding = long();
        let fields = excluding.turns[1].fields().clone();
        excluding.turns[1] = Message::from_fields("messages[1]", fields, Some(false));
        assert_eq!(said(source, &excluding), [expected], "the row excludes a turn");
    }
}

#[test]
fn a_template_that_writes_earlier_turns_otherwise_has_its_spans_found() {
    assert_eq!(said(THINKING, &long()), ["b<|im_end|>\n", "<think>\n\n</think>\n\nd<|im_end|>\n"]);
    assert_eq!(said(ENDED, &long()), ["b<|end|>\n", "d<|end|>\n</s>"]);
    assert_eq!(said(FORGETFUL, &long()), ["b</s>", "d</s>"]);
    assert_eq!(said(LATE_SYSTEM, &long()), [" b</s>", " d</s>"]);
    // Words that stand elsewhere too.
    let repeated = chat(&[("user", "user"), ("assistant", "assistant"), ("user", "think"), ("assistant", "think")]);
    assert_eq!(said(THINKING, &repeated), ["assistant<|im_end|>\n", "<think>\n\n</think>\n\nthink<|im_end|>\n"]);
    assert_eq!(
        said(FORGETFUL, &chat(&[("user", "<A>"), ("assistant", "<think"), ("user", "b"), ("assistant", "<")])),
        ["<think</s>", "<</s>"]
    );
}

/// As Qwen 3.5: the model is asked without thoughts by empty ones, which earlier turns have not, and there must be a
/// question.
const UNTHINKING: &str = "{%- if not messages | selectattr('role', 'equalto', 'user') | list %}\
    {{- raise_exception('No user query found in messages.') }}{%- endif %}\
    {%- set ns = namespace(last=0) %}\
    {%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}\
    {%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}\
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}\
    {{- m.content or '' }}{%- for call in m.tool_calls or [] %}\
    {{- '<tool_call>\n<function=' + call.function.name + '>\n</tool_call>' }}{%- endfor %}\
    {{- '<|im_end|>\n' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{%- endif %}";

#[test]
fn a_turn_begins_behind_the_turn_before_it_whatever_the_model_is_asked_with() {
    let conversation = chat(&[("user", "a>\n\nb"), ("assistant", "x"), ("user", "\n\n"), ("assistant", "y")]);
    assert_eq!(said(UNTHINKING, &conversation), ["x<|im_end|>\n", "y<|im_end|>\n"]);
    let call = json!([{"type": "function", "function": {"name": "weather", "arguments": {}}}]);
    let calling = of_turns([
        turn(0, json!({"role": "system", "content": "</think>\n\n"})),
        turn(1, json!({"role": "user", "content": "hot?\n\n"})),
        turn(2, json!({"role": "assistant", "tool_calls": call})),
        turn(3, json!({"role": "tool", "content": "21"})),
        turn(4, json!({"role": "user", "content": "so?"})),
        turn(5, json!({"role": "assistant", "content": "no"})),
    ]);
    let called = "<tool_call>\n<function=weather>\n</tool_call><|im_end|>\n";
    assert_eq!(said(UNTHINKING, &calling), [called, "no<|im_end|>\n"]);
    let asked_to_think = UNTHINKING
        .replace("assistant\n<think>\n\n</think>\n\n' }}{%- endif %}", "assistant\n<think>\n' }}{%- endif %}");
    assert_eq!(said(&asked_to_think, &calling)[0], called);
}

#[test]
fn a_template_may_refuse_a_conversation_that_breaks_off_before_a_question() {
    let conversation = chat(&[("system", "be kind"), ("assistant", "hello"), ("user", "hi"), ("assistant", "yes")]);
    assert_eq!(said(UNTHINKING, &conversation), ["hello", "yes<|im_end|>\n"]);
}

#[test]
fn an_assistant_may_speak_first() {
    let first = chat(&[("assistant", "hello"), ("user", "hi"), ("assistant", "yes")]);
    assert_eq!(said(HEADERS, &first), ["hello<eot>", "yes<eot>"]);
    assert_eq!(said(CHATML, &first), ["hello<|im_end|>\n", "yes<|im_end|>\n"]);
}

#[test]
fn thoughts_that_are_to_be_learned_are_never_left_out_and_others_are_counted() {
    let thoughtful =
        |turns: [&str; 2]| chat(&[("user", "a"), ("assistant", turns[0]), ("user", "c"), ("assistant", turns[1])]);
    let last = thoughtful(["b", "<think>\nhm\n</think>\n\nd"]);
    assert_eq!(said(THINKING, &last), ["b<|im_end|>\n", "<think>\nhm\n</think>\n\nd<|im_end|>\n"]);
    let first = thoughtful(["<think>\nhm\n</think>\n\nb", "d"]);
    let message = error(THINKING, &first);
    assert!(
        message.starts_with("messages[1].content would not be learned") && message.contains("prompt and completion"),
        "{message}"
    );
    let mut notes = Notes::default();
    let given = Conversation { given: 3, ..first };
    template_of(THINKING).conversation(&given, &mut notes).unwrap();
    assert!(notes.lines()[0].contains("reasoning of earlier turns"), "{notes:?}");
    assert!(error(FORGETFUL, &last).starts_with("messages[3].content would not be learned"));
    let mut fields = last.turns[1].fields().clone();
    fields.insert("reasoning".into(), "because".into());
    let unread = of_turns([last.turns[0].clone(), Message::from_fields("messages[1]", fields, None)]);
    assert!(error(CHATML, &unread).starts_with("messages[1].reasoning would not be learned"));
    assert!(said(THINKING, &unread)[0].contains("because"), "it goes by another name there");
}

#[test]
fn a_turn_that_does_not_reach_the_text_is_named() {
    let without_tools = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.role }}:{{ m.content }};{% endif %}\
        {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    let conversation = chat(&[("user", "a"), ("assistant", "b"), ("tool", "42"), ("assistant", "d")]);
    let message = error(without_tools, &conversation);
    assert!(message.starts_with("messages[2].content would not be seen by the model"), "{message}");
    let whole = template_of(without_tools).whole_conversation(&conversation, &mut Notes::default());
    assert_eq!(whole.unwrap_err(), message, "whatever of the row is learned");
    let last_only = "{% for m in messages %}{{ m.content if loop.last else '' }};{% endfor %}";
    assert!(error(last_only, &long()).starts_with("messages[1].content would not be learned"));
    let tools = vec![json!({"type": "function", "function": {"name": "weather", "parameters": {}}})];
    let message = error(CHATML, &Conversation { tools, ..long() });
    assert!(message.starts_with("tools: weather would not be seen"), "{message}");
}

#[test]
fn words_may_stand_as_json_in_the_text() {
    let source = "{% for m in messages %}{% if m.role == 'tool' %}{{ {'result': m.content} | tojson }}{% else %}\
        {{ m.role }}:{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    let conversation = chat(&[("user", "a"), ("tool", "{\"t\": \"é\"}\n"), ("assistant", "d")]);
    assert_eq!(said(source, &conversation), ["d;"]);
}

#[test]
fn a_system_turn_that_goes_once_the_question_is_answered_stays_in_the_prompt() {
    let conversation = chat(&[("system", "be kind"), ("user", "hi"), ("assistant", "yes")]);
    let (text, said) = rendered(LATE_SYSTEM, &conversation).unwrap();
    assert_eq!(text, "<s>[INST] be kind\n\nhi[/INST] yes</s>");
    assert_eq!(said, [" yes</s>"]);
    let (whole, _) = template_of(LATE_SYSTEM).whole_conversation(&conversation, &mut Notes::default()).unwrap();
    assert_eq!(whole, text);
    let two =
        chat(&[("system", "be kind"), ("user", "hi"), ("assistant", "yes"), ("user", "sure"), ("assistant", "no")]);
    let message = error(LATE_SYSTEM, &two);
    assert!(
        message.starts_with("messages[0].content would not be seen") && !message.contains("assistantOnlyLoss"),
        "{message}"
    );
    let given = Conversation { given: 4, ..two };
    assert_eq!(
        rendered(LATE_SYSTEM, &given).unwrap().0,
        "<s>[INST] hi[/INST] yes</s>[INST] be kind\n\nsure[/INST] no</s>"
    );
}

#[test]
fn calls_of_tools_are_learned_with_what_is_written_around_them() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for call in m.tool_calls or [] %}\
        <call>{\"name\": \"{{ call.function.name }}\", \"arguments\": {{ call.function.arguments | tojson }}}</call>\
        {% endfor %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let calls = json!([{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]);
    let conversation = of_turns([
        turn(0, json!({"role": "user", "content": "hot?"})),
        turn(1, json!({"role": "assistant", "tool_calls": calls})),
        turn(2, json!({"role": "tool", "content": "21"})),
        turn(3, json!({"role": "assistant", "content": "no", "tool_calls": []})),
    ]);
    let call = "<call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}</call><end>";
    assert_eq!(said(source, &conversation), [call, "no<end>"]);
    let joined = source.replace("{{ call.function.arguments | tojson }}", "{{ '' + call.function.arguments }}");
    assert_eq!(said(&joined, &conversation)[0], call, "a template that joins them as a text gets a text");
    let ignored = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}<end>{% endfor %}";
    assert!(error(ignored, &conversation).starts_with("messages[1].tool_calls[0].function.name would not be learned"));
}

#[test]
fn a_function_that_only_its_calls_name_is_lost() {
    let calls = "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}\
        {{ call.function.name }}{% endfor %}";
    let source = format!(
        "{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content or '' }}}}{calls};{{% endfor %}}\
        {{% if add_generation_prompt %}}<assistant>{{% endif %}}"
    );
    let call = json!([{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]);
    let mut conversation = of_turns([
        turn(0, json!({"role": "user", "content": "hot?"})),
        turn(1, json!({"role": "assistant", "tool_calls": call})),
    ]);
    assert_eq!(said(&source, &conversation), ["{\"city\": \"Oslo\"}weather;"], "arguments may stand before the name");
    let tool = |name: &str| {
        let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
        json!({"type": "function", "function": {"name": name, "description": "Tells \"it\".", "parameters": parameters}})
    };
    conversation.tools = vec![tool("weather")];
    assert!(error(&source, &conversation).starts_with("tools: weather would not be seen"));
    let names = format!("{{% for t in tools or [] %}}{{{{ t.function.name }}}}{{% endfor %}}{source}");
    let lines = |source: &str| {
        let mut notes = Notes::default();
        template_of(source).conversation(&conversation, &mut notes).unwrap();
        notes.lines()
    };
    assert_eq!(lines(&names), ["the chat template leaves the descriptions of functions out (1 row)"]);
    assert!(lines(&format!("{{{{ tools | tojson }}}}{source}")).is_empty());
}

#[test]
fn a_speakers_name_that_is_not_written_is_counted() {
    let conversation = of_turns([
        turn(0, json!({"role": "user", "content": "a", "name": "Ann"})),
        turn(1, json!({"role": "assistant", "content": "b"})),
    ]);
    let lines = |source: &str| {
        let mut notes = Notes::default();
        template_of(source).conversation(&conversation, &mut notes).unwrap();
        notes.lines()
    };
    let for_tools = format!("{{% for t in tools or [] %}}{{{{ t.function.name }}}}{{% endfor %}}{CHATML}");
    for source in [CHATML, &for_tools] {
        assert_eq!(lines(source), ["a turn's field \"name\" is not used by the chat template (1 row)"]);
    }
    assert!(lines("{% for m in messages %}<{{ m.name or m.role }}>{{ m.content }};{% endfor %}").is_empty());
}

#[test]
fn fields_and_variables_that_a_template_ignores_are_counted() {
    let mut notes = Notes::default();
    let mut conversation = of_turns([
        turn(0, json!({"role": "user", "content": "a", "mood": "good"})),
        turn(1, json!({"role": "assistant", "content": "b", "refusal": null})),
    ]);
    conversation.variables.insert("enable_thinking".into(), false.into());
    template_of(CHATML).conversation(&conversation, &mut notes).unwrap();
    let lines = notes.lines();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(
        lines[0].contains("field \"mood\"") && lines[1].contains("chat_template_kwargs.enable_thinking"),
        "{lines:?}"
    );
    conversation.variables.insert("messages".into(), json!([]));
    assert!(error(CHATML, &conversation).contains("chat_template_kwargs.messages"));
}

#[test]
fn a_field_whose_name_the_template_has_for_something_else_is_counted() {
    let source = "{{ tools }}{{ limit }}{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}";
    for (field, value, is_counted) in [
        ("tools", json!([{"name": "weather"}]), true),
        ("limit", json!(7), true),
        ("limit", json!(true), true),
        ("limit", json!({}), false),
        ("limit", json!(false), false),
        ("content", json!("a"), false),
    ] {
        let mut turns = long().turns;
        let mut fields = turns[0].fields().clone();
        fields.insert(field.into(), value.clone());
        turns[0] = turns[0].with_fields(fields);
        let mut notes = Notes::default();
        template_of(source).conversation(&of_turns(turns), &mut notes).unwrap();
        let expected = format!("a turn's field \"{field}\" is not used by the chat template (1 row)");
        assert_eq!(notes.lines(), Vec::from_iter(is_counted.then_some(expected)), "{field}: {value}");
    }
}

#[test]
fn a_template_can_raise_and_its_words_reach_the_user() {
    assert_eq!(
        error("{{ raise_exception('roles must alternate') }}", &long()),
        "the chat template refuses it: roles must alternate"
    );
}

#[test]
fn templates_may_use_python_methods_special_tokens_and_json() {
    let source = "{{ bos_token }}{{ messages[0].content.strip().upper() }}{{ messages[0] | tojson }}\
        {% if tools is not none %}x{% endif %}{{ eos_token }}{{ pad_token }}";
    assert_eq!(text(source, &chat(&[("user", " a<b ")])), r#"<s>A<B{"role": "user", "content": " a<b "}</s>"#);
}

#[test]
fn the_date_of_a_template_is_that_of_the_run() {
    let template = template_of("{{ strftime_now('%d %b %Y') }}{{ date_string }}");
    assert_eq!(template.written_date(), None);
    assert_eq!(template.render(&long(), &long().turns, false).unwrap(), "27 Nov 2026");
    assert!(template.written_date().is_some());
    let pinned = TemplateDate::Pinned(NaiveDate::from_ymd_opt(2024, 7, 6).unwrap());
    let template = ChatTemplate::new("{{ date_string }}", Map::new(), pinned).unwrap();
    assert_eq!(template.render(&long(), &long().turns, false).unwrap(), "06 Jul 2024");
    assert!(error("{{ strftime_now('%Q') }}", &long()).contains("is no format of a date"));
}

#[test]
fn a_template_that_can_not_be_read_is_another_thing_than_none() {
    let folder = tempfile::tempdir().unwrap();
    let load = |config: Value| ChatTemplate::load(folder.path(), &config, Map::new(), TemplateDate::today());
    assert!(load(json!({})).unwrap().is_none());
    let named = |name: &str| json!({"chat_template": [{"name": name, "template": "x"}]});
    assert_eq!(load(named("default")).unwrap().unwrap().source(), "x");
    assert!(load(named("rag")).err().unwrap().contains("named \"default\""));
    assert!(load(json!({"chat_template": 7})).is_err());
    std::fs::write(folder.path().join("chat_template.jinja"), b"{{ messages }}\xff").unwrap();
    let message = load(json!({"chat_template": "y"})).err().unwrap();
    assert_eq!(message, "chat_template.jinja is not UTF-8 at byte 15; save the file as UTF-8");
}

#[test]
fn conversations_with_tools_have_a_template_of_their_own_where_the_model_brings_one() {
    let tools =
        "{% for t in tools %}{{ t.function.name }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}";
    let config =
        json!({"chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": tools}]});
    let template =
        ChatTemplate::load(Path::new("/nowhere"), &config, Map::new(), TemplateDate::today()).unwrap().unwrap();
    let with_tools = Conversation { tools: vec![json!({"function": {"name": "weather"}})], ..long() };
    assert_eq!(template.render(&with_tools, &with_tools.turns, false).unwrap(), "weatherabcd");
    assert_eq!(template.render(&long(), &long().turns, false).unwrap(), "plain");
    // As transformers 5 saves them.
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), "plain").unwrap();
    std::fs::write(folder.path().join("additional_chat_templates/tool_use.jinja"), tools).unwrap();
    let template = ChatTemplate::load(folder.path(), &json!({}), Map::new(), TemplateDate::today()).unwrap().unwrap();
    assert_eq!(template.render(&with_tools, &with_tools.turns, false).unwrap(), "weatherabcd");
    assert_eq!(template.render(&long(), &long().turns, false).unwrap(), "plain");
}

/// Templates for training, each beside the beginning of its family's own.
const FOR_TRAINING: [(&str, &str); 7] = [
    ("qwen3", include_str!("../../../../examples/chat-templates/qwen3.jinja")),
    ("deepseek-r1", include_str!("../../../../examples/chat-templates/deepseek-r1.jinja")),
    ("mistral", include_str!("../../../../examples/chat-templates/mistral.jinja")),
    ("phi3.5", include_str!("../../../../examples/chat-templates/phi3.5.jinja")),
    ("phi4", include_str!("../../../../examples/chat-templates/phi4.jinja")),
    ("llama3", include_str!("../../../../examples/chat-templates/llama3.jinja")),
    ("gemma3", include_str!("../../../../examples/chat-templates/gemma3.jinja")),
];

#[test]
fn the_templates_for_training_learn_each_answer_and_its_end() {
    let conversation =
        chat(&[("system", "be kind"), ("user", "a"), ("assistant", "yes"), ("user", "c"), ("assistant", "no")]);
    for (name, source) in FOR_TRAINING {
        let end = match name {
            "qwen3" | "phi4" => "<|im_end|>",
            "deepseek-r1" => "<｜end▁of▁sentence｜>",
            "phi3.5" => "<|end|>",
            "llama3" => "<|eot_id|>",
            "gemma3" => "<end_of_turn>",
            _ => "</s>",
        };
        let said = said(source, &conversation);
        assert_eq!(said.len(), 2, "{name}");
        for (said, answer) in said.iter().zip(["yes", "no"]) {
            assert!(said.ends_with(&format!("{answer}{end}")), "{name}: {said}");
        }
        // The model is asked as in the text that it learns.
        let asked = template_of(source).prompt(&conversation.turns[..4]).unwrap();
        let whole = text(source, &conversation).replace(SENTINELS, "");
        assert!(whole.starts_with(&asked), "{name}: {asked:?} {whole:?}");
    }
}

#[test]
fn the_templates_for_training_keep_reasoning_where_the_family_reasons() {
    let conversation =
        chat(&[("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c"), ("assistant", "d")]);
    for (name, source) in FOR_TRAINING.iter().filter(|(name, _)| ["qwen3", "deepseek-r1"].contains(name)) {
        let said = said(source, &conversation);
        assert!(said[0].contains("hm\n</think>\n\nb") && said[1].contains("</think>\n\nd"), "{name}: {said:?}");
    }
}
