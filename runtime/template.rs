//! A conversation -> the text a model was trained to answer, by its Jinja chat template.
//!
//! Templates are written for Python's Jinja with blocks trimmed, Python's string methods, `raise_exception`, `tojson` as
//! `json.dumps` prints it, and `strftime_now` (in UTC here).

use mansard_ir::{Error, Kind, Result};
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::Serialize;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A chat template and what it refers to.
pub struct Template<'a> {
    /// Jinja.
    pub source: &'a str,
    /// Text of the begin-of-sequence token.
    pub begin: &'a str,
    /// Text of the end-of-sequence token.
    pub end: &'a str,
}

impl Template<'_> {
    /// The prompt of a conversation, up to where the answer begins.
    ///
    /// # Errors
    /// Where the template is malformed or raises an exception, with its line.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: &str| strftime(format, now()));
        environment.add_filter("tojson", to_json);
        let rendered = environment.render_str(
            self.source,
            context! { messages, bos_token => self.begin, eos_token => self.end, add_generation_prompt => true },
        );
        rendered.map_err(|e| {
            let line = e.line().map_or(String::new(), |line| format!(" line {line}:"));
            let detail = e.detail().map_or_else(|| e.to_string(), str::to_owned);
            Error::new(Kind::Input, format!("chat template:{line} {detail}")).caused_by(e)
        })
    }
}

/// `value | tojson(indent=2)`, as Python's `json.dumps(value, ensure_ascii=False)`.
fn to_json(value: Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Python's other options have no bearing on what templates print.
    let _: (Option<Value>, Option<Value>) = (options.get("ensure_ascii")?, options.get("sort_keys")?);
    options.assert_all_used()?;
    let mut out = vec![];
    let written = match indent {
        Some(n) => {
            let indent = " ".repeat(n.min(64));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter)),
    };
    written.map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// `{"a": 1, "b": [1, 2]}`: a space after commas and colons.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Seconds since 1970, in UTC.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The codes that templates use; others stay as they are.
fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, time) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[days as usize % 7]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        let code = if c == '%' { chars.next() } else { None };
        match code {
            None => out.push(c),
            Some('Y') => out += &year.to_string(),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", time / 3600),
            Some('M') => out += &format!("{:02}", time / 60 % 60),
            Some('S') => out += &format!("{:02}", time % 60),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
        }
    }
    out
}

/// Year, month and day of a day since 1970 in the Gregorian calendar, counted in eras of 400 years from 1 March 0000.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String> {
        Template { source, begin: "<s>", end: "</s>" }.render(messages)
    }

    #[test]
    fn chatml_and_its_like() {
        let source = "{{ bos_token }}{% for message in messages %}\n  {% if loop.first and message['role'] != 'system' %}\n\
                      <|system|>default\n{% endif %}\n<|{{ message.role }}|>{{ message.content.strip() }}{{ eos_token }}\n\
                      {% endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}";
        let text = render(source, &[Message::new("user", "  hi "), Message::new("assistant", "ho")]).unwrap();
        assert_eq!(text, "<s><|system|>default\n<|user|>hi</s>\n<|assistant|>ho</s>\n<|assistant|>");
    }

    #[test]
    fn exceptions_carry_their_words() {
        let source = "{% if messages[0].role != 'user' %}\n{{ raise_exception('start with a user') }}{% endif %}";
        let error = render(source, &[Message::new("assistant", "")]).unwrap_err();
        assert!(error.message().contains("start with a user") && error.message().contains("line 2"), "{error}");
        assert_eq!(render("{% for", &[]).unwrap_err().exit_code(), 3);
    }

    #[test]
    fn python_spellings() {
        let source = "{% set x = {'a': [1, 'b<c'], 'd': none} %}{{ x | tojson }}{{ 'a,b'.split(',')[1].upper() }}\
                      {{ messages[0]['content'].startswith('q') }}{{ messages[-1].content[:2] }}";
        let text = render(source, &[Message::new("user", "query")]).unwrap();
        assert_eq!(text.to_lowercase(), "{\"a\": [1, \"b<c\"], \"d\": null}btruequ");
    }

    #[test]
    fn dates() {
        assert_eq!(strftime("%d %b %Y %A %H:%M:%S %% %q", 951_827_696), "29 Feb 2000 Tuesday 12:34:56 % %q");
        assert_eq!(strftime("%Y-%m-%d, %B", 1_795_245_223), "2026-11-21, November");
    }
}
