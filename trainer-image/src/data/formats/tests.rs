//! Rows of every format, and what is refused of them.

use serde_json::json;

use super::*;

fn row(columns: Value) -> Result<Row, String> {
    let columns = columns.as_object().unwrap().clone();
    parse(detect(&columns, &[])?, columns, &mut Notes::default())
}

fn turns(turns: &[(&str, &str)]) -> Vec<(String, String)> {
    turns.iter().map(|(role, content)| ((*role).to_owned(), (*content).to_owned())).collect()
}

/// Roles and contents of a conversation's turns.
fn said(row: &Row) -> Vec<(String, String)> {
    let Row::Conversation(conversation) = row else { panic!("{row:?}") };
    conversation.turns.iter().map(|turn| (turn.role().to_owned(), turn.content().to_owned())).collect()
}

fn task(instruction: &str, output: &str) -> Alpaca {
    Alpaca { instruction: instruction.into(), output: output.into(), ..Alpaca::default() }
}

#[test]
fn each_format_is_told_from_its_columns() {
    let chat = turns(&[("user", "hi"), ("assistant", "yes")]);
    let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]);
    assert_eq!(said(&row(json!({"messages": messages})).unwrap()), chat);
    let conversations = json!([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]);
    assert_eq!(said(&row(json!({"conversations": conversations, "id": 7})).unwrap()), chat);
    let (prompt, completion) = ("2 + 2 =".to_owned(), " 4".to_owned());
    let expected = Row::PromptCompletion { prompt: prompt.clone(), completion: completion.clone() };
    assert_eq!(row(json!({"prompt": prompt, "completion": completion})), Ok(expected));
    let split = row(json!({"prompt": [messages[0]], "completion": [messages[1]]})).unwrap();
    assert_eq!(said(&split), chat);
    assert!(matches!(split, Row::Conversation(Conversation { given: 1, .. })));
    let as_text = json!({"prompt": json!([messages[0]]).to_string(), "completion": json!([messages[1]]).to_string()});
    assert_eq!(row(as_text).unwrap(), split);
    let list = json!({"prompt": "a", "completion": "[{\"x\": 1}]"});
    assert!(matches!(row(list), Ok(Row::PromptCompletion { .. })), "a list that is no conversation is a text");
    let alpaca = Row::Alpaca(Alpaca { input: "2, 2".into(), ..task("Add.", "4") });
    let columns = json!({"instruction": "Add.", "input": "2, 2", "output": "4", "text": "Below is an instruction"});
    assert_eq!(row(columns), Ok(alpaca));
    assert_eq!(row(json!({"text": "abc"})), Ok(Row::Text("abc".into())));
}

#[test]
fn alpaca_may_go_without_input() {
    for columns in [
        json!({"instruction": "Sing.", "output": "la"}),
        json!({"instruction": "Sing.", "input": null, "output": "la"}),
        json!({"instruction": "Sing.", "input": "", "output": "la"}),
    ] {
        let expected = Row::Alpaca(task("Sing.", "la"));
        assert_eq!(row(columns), Ok(expected));
    }
}

#[test]
fn the_rows_of_the_documentation_are_of_the_formats_that_it_names() {
    let page = include_str!("../../../../docs/data.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | `{"));
    let mut formats = Vec::new();
    for (format, rest) in rows {
        let columns: Columns = serde_json::from_str(&format!("{{{}", rest.split('`').next().unwrap())).unwrap();
        let format: DataFormat = serde_json::from_value(json!(format)).unwrap();
        assert_eq!(detect(&columns, &[]), Ok(format));
        parse(format, columns, &mut Notes::default()).unwrap();
        formats.push(format);
    }
    assert_eq!(formats.len(), 7, "{formats:?}");
}

#[test]
fn columns_that_a_table_has_but_a_row_leaves_empty_are_none() {
    let messages = json!([{"role": "user", "content": "hi", "tool_calls": []}]);
    let columns = json!({"messages": messages, "tools": [], "prompt": null, "completion": null});
    assert!(matches!(row(columns), Ok(Row::Conversation(_))));
    assert_eq!(row(json!({"messages": null, "text": "abc"})), Ok(Row::Text("abc".into())));
}

#[test]
fn share_gpt_has_many_names_for_its_speakers() {
    let conversations = json!([
        {"from": "user", "value": "a"}, {"from": "chatgpt", "value": "b"},
        {"role": "user", "content": "c"}, {"from": "model", "value": "d"},
    ]);
    let expected = turns(&[("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    assert_eq!(said(&row(json!({"system": "s", "conversations": conversations})).unwrap()), expected);
}

/// A row, and what of it is not used.
fn noted(columns: Value) -> (Row, Vec<String>) {
    let columns = columns.as_object().unwrap().clone();
    let mut notes = Notes::default();
    let row = parse(detect(&columns, &[]).unwrap(), columns, &mut notes).unwrap();
    (row, notes.lines())
}

#[test]
fn a_system_text_is_carried_out_whatever_the_format() {
    let chat = turns(&[("system", "s"), ("user", "hi"), ("assistant", "yes")]);
    let (user, assistant) = (json!({"role": "user", "content": "hi"}), json!({"role": "assistant", "content": "yes"}));
    let messages = row(json!({"system": "s", "messages": [user, assistant]})).unwrap();
    assert_eq!(said(&messages), chat);
    let split = row(json!({"system": "s", "prompt": [user], "completion": [assistant]})).unwrap();
    assert_eq!(said(&split), chat);
    assert!(matches!(split, Row::Conversation(Conversation { given: 2, .. })));
    let texts = row(json!({"system": "s", "prompt": "a", "completion": "b"}));
    assert_eq!(texts, Ok(Row::PromptCompletion { prompt: "s\n\na".into(), completion: "b".into() }));
    let alpaca = row(json!({"system": "s", "instruction": "Add.", "output": "4"}));
    assert_eq!(alpaca, Ok(Row::Alpaca(Alpaca { system: "s".into(), ..task("Add.", "4") })));
    let system = json!({"role": "system", "content": "other"});
    let error = row(json!({"system": "s", "messages": [system, user, assistant]})).unwrap_err();
    assert_eq!(error, "system and messages[0] are two system turns; keep one");
    let twice = row(json!({"system": "other", "messages": [system, user, assistant]})).unwrap();
    assert_eq!(said(&twice).len(), 3);
}

#[test]
fn alpaca_may_have_a_history_and_dollys_words() {
    let history = json!([["a", "b"], ["c", "d"]]);
    let pairs = [("a", "b"), ("c", "d")].map(|(asked, answered)| (asked.to_owned(), answered.to_owned()));
    for history in [history.clone(), Value::from(history.to_string())] {
        let columns = json!({"instruction": "Add.", "output": "4", "history": history});
        let expected = Alpaca { history: pairs.to_vec(), ..task("Add.", "4") };
        assert_eq!(noted(columns), (Row::Alpaca(expected), vec![]));
    }
    for none in [json!([]), Value::Null, json!("[]"), json!("")] {
        let columns = json!({"instruction": "Add.", "output": "4", "history": none});
        assert_eq!(row(columns), Ok(Row::Alpaca(task("Add.", "4"))));
    }
    let dolly = json!({"instruction": "Add.", "context": "2, 2", "response": "4", "category": "sums"});
    let expected = Alpaca { input: "2, 2".into(), ..task("Add.", "4") };
    assert_eq!(noted(dolly), (Row::Alpaca(expected), vec!["column \"category\" is not used (1 row)".to_owned()]));
    for (columns, expected) in [
        (json!({"instruction": "a", "output": "b", "response": "c"}), "output and response are both there"),
        (json!({"instruction": "a", "input": "b", "context": "c", "output": "d"}), "input and context are both there"),
        (json!({"instruction": "a", "output": "b", "history": [["a"]]}), "history[0] is not a pair of strings"),
        (json!({"instruction": "a", "output": "b", "history": [["a", ""]]}), "history[0] has an empty answer"),
        (json!({"instruction": "a", "output": " \n"}), "output is empty"),
        (
            json!({"instruction": "a", "output": "b", "tools": [{"name": "f"}]}),
            "tools: functions are for rows of turns",
        ),
    ] {
        let error = row(columns).unwrap_err();
        assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
    }
}

#[test]
fn tools_and_variables_go_to_the_template() {
    let turns = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]);
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let prompt_and_completion = json!({
        "prompt": [turns[0]], "completion": [turns[1]], "tools": [tool],
        "chat_template_kwargs": {"enable_thinking": false, "other": null},
    });
    let share_gpt = json!({
        "conversations": turns, "tools": json!([tool]).to_string(),
        "chat_template_kwargs": "{\"enable_thinking\": false}",
    });
    for columns in [prompt_and_completion, share_gpt] {
        let (Row::Conversation(conversation), notes) = noted(columns) else { panic!() };
        assert_eq!(conversation.tools, std::slice::from_ref(&tool));
        assert_eq!(Value::Object(conversation.variables), json!({"enable_thinking": false}));
        assert!(notes.is_empty(), "{notes:?}");
    }
    for (columns, expected) in [
        (json!({"messages": turns, "chat_template_kwargs": {"tools": []}}), "chat_template_kwargs.tools can't be set"),
        (json!({"messages": turns, "chat_template_kwargs": 4}), "chat_template_kwargs is not an object"),
        (json!({"prompt": "a", "completion": "b", "tools": [tool]}), "tools: functions are for rows of turns"),
    ] {
        let error = row(columns).unwrap_err();
        assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
    }
}

#[test]
fn columns_that_the_format_does_not_know_are_noted() {
    let turns = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]);
    let columns = json!({"messages": turns, "prompt": "hi", "source": "web", "none": null, "tags": []});
    let (_, notes) = noted(columns);
    assert_eq!(notes, ["column \"prompt\" is not used (1 row)", "column \"source\" is not used (1 row)"]);
    let (_, notes) = noted(json!({"text": "a", "x".repeat(100): 1}));
    assert_eq!(notes, [format!("column \"{}…\" is not used (1 row)", "x".repeat(60))]);
}

#[test]
fn data_of_other_kinds_is_named_where_no_format_fits() {
    for (columns, expected) in [
        (
            json!({"data": [{"text": "a"}]}),
            "if data holds turns, set {messages: data}; if it holds the rows, write them",
        ),
        (json!({"prompt": "a"}), "prompts alone (for reinforcement learning) are not supported"),
        (json!({"prompt": "a", "completions": ["b"]}), "several completions of a prompt"),
        (json!({"question": "a", "answer": "b"}), "dataset.columns, such as {prompt: question, completion: answer}"),
    ] {
        let error = row(columns).unwrap_err();
        assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
    }
}

#[test]
fn what_is_wrong_with_a_row_is_named_by_its_field() {
    for (columns, expected) in [
        (
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}),
            "messages[1].content is missing",
        ),
        (json!({"messages": [{"role": "bot", "content": "a"}]}), "messages[0].role is \"bot\"; supported: system"),
        (json!({"messages": [{"role": "user", "content": 4}]}), "messages[0].content is not a string"),
        (json!({"messages": "hello"}), "messages is not a list"),
        (json!({"messages": []}), "messages is empty"),
        (json!({"messages": [{"role": "user", "content": "a"}], "tools": [4]}), "tools[0] is not an object"),
        (json!({"conversations": [{"from": "human"}]}), "conversations[0].value is missing; each turn needs from"),
        (
            json!({"conversations": [{"from": "function_call", "value": ""}]}),
            "conversations[0].value is not a list of calls",
        ),
        (json!({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}), "must both be strings"),
        (json!({"prompt": "a", "completion": ""}), "completion is empty"),
        (json!({"instruction": "a", "input": ["b"], "output": "c"}), "input is not a string"),
        (json!({"question": "a", "answer": "b"}), "[question, answer]; supported: messages; conversations;"),
    ] {
        let error = row(columns).unwrap_err();
        assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
    }
}
