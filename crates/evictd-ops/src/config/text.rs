//! Values and their types: a key has the type of its default.

use toml::Value;

/// Parses a value of the environment or a flag by the type of its key's default. `Err` says what was expected.
pub(super) fn parse(text: &str, default: &Value) -> Result<Value, String> {
    let parsed = match default {
        Value::String(_) => Some(Value::String(text.to_owned())),
        Value::Integer(_) => text.trim().parse().ok().map(Value::Integer),
        Value::Float(_) => text.trim().parse().ok().map(Value::Float),
        Value::Boolean(_) => text.trim().parse().ok().map(Value::Boolean),
        Value::Datetime(_) => text.trim().parse().ok().map(Value::Datetime),
        Value::Array(defaults) => parse_list(text, defaults),
        Value::Table(_) => None,
    };
    parsed.ok_or_else(|| expected(default))
}

/// Comma separated. The elements of an array whose default is empty are strings.
fn parse_list(text: &str, defaults: &[Value]) -> Option<Value> {
    let string = Value::String(String::new());
    let element = defaults.first().unwrap_or(&string);
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    items.map(|item| parse(item, element).ok()).collect::<Option<_>>().map(Value::Array)
}

/// Accepts a value of a file if it has the type of its key's default. `Err` says what was expected.
pub(super) fn fit(value: Value, default: &Value) -> Result<Value, String> {
    match (value, default) {
        (Value::Integer(whole), Value::Float(_)) => Ok(Value::Float(whole as f64)),
        (Value::Array(items), Value::Array(defaults)) => {
            let Some(element) = defaults.first() else { return Ok(Value::Array(items)) };
            let fitted: Result<_, _> = items.into_iter().map(|item| fit(item, element)).collect();
            fitted.map(Value::Array).map_err(|_| expected(default))
        }
        (value, default) if value.same_type(default) => Ok(value),
        (value, default) => Err(format!("{}, not {}", expected(default), type_name(&value))),
    }
}

/// Describes what a key with this default takes, with the default as the example.
fn expected(default: &Value) -> String {
    match default {
        Value::String(text) if text.is_empty() => "a string".to_owned(),
        Value::Boolean(_) => "true or false".to_owned(),
        Value::Array(items) => match items.first() {
            Some(Value::String(_)) | None => format!("a list of strings, such as {}", example(items)),
            Some(Value::Integer(_)) => format!("a list of integers, such as {default}"),
            Some(_) => format!("a list such as {default}"),
        },
        Value::Table(_) => "a table, which only a file can give".to_owned(),
        _ => format!("{}, such as {default}", type_name(default)),
    }
}

fn example(items: &[Value]) -> String {
    if items.is_empty() { r#"["a", "b"]"#.to_owned() } else { Value::Array(items.to_vec()).to_string() }
}

/// A value's type, with its article.
pub(super) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "an integer",
        Value::Float(_) => "a number",
        Value::Boolean(_) => "a boolean",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a section",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(items: &[&str]) -> Value {
        Value::Array(items.iter().map(|item| Value::from(*item)).collect())
    }

    #[test]
    fn text_is_parsed_by_the_type_of_the_default() {
        assert_eq!(parse("7", &Value::from("x")), Ok(Value::from("7")));
        assert_eq!(parse(" 7 ", &Value::from(1)), Ok(Value::from(7)));
        assert_eq!(parse("7", &Value::from(0.5)), Ok(Value::from(7.0)));
        assert_eq!(parse("true", &Value::from(false)), Ok(Value::from(true)));
        assert_eq!(parse("a, b,", &list(&[])), Ok(list(&["a", "b"])));
        assert_eq!(parse("", &list(&["x"])), Ok(list(&[])));
        assert_eq!(parse("1,2", &Value::from(vec![0])), Ok(Value::from(vec![1, 2])));
    }

    #[test]
    fn text_of_the_wrong_type_says_what_was_expected() {
        assert_eq!(parse("many", &Value::from(64)), Err("an integer, such as 64".to_owned()));
        assert_eq!(parse("yes", &Value::from(true)), Err("true or false".to_owned()));
        assert_eq!(parse("1,x", &Value::from(vec![0])), Err("a list of integers, such as [0]".to_owned()));
    }

    #[test]
    fn file_value_must_have_the_type_of_the_default() {
        assert_eq!(fit(Value::from(2), &Value::from(0.5)), Ok(Value::from(2.0)));
        assert_eq!(
            fit(Value::from(30), &Value::from("30s")),
            Err("a string, such as \"30s\", not an integer".to_owned())
        );
        assert_eq!(
            fit(Value::from(vec![1]), &list(&["a"])),
            Err("a list of strings, such as [\"a\"]".to_owned())
        );
        assert_eq!(
            fit(Value::from("a"), &list(&[])).unwrap_err(),
            r#"a list of strings, such as ["a", "b"], not a string"#
        );
    }
}
