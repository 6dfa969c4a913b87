//! What was seen of a producer of KSM pages, in a form in which two of them can be compared.

use std::collections::BTreeMap;
use std::fmt::Display;

use anyhow::Result;
use anyhow::ensure;

/// How many differences of one topic are shown.
const SHOWN: usize = 6;

/// What was seen: for each topic (a file, a process) and question about it, the answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record(BTreeMap<String, BTreeMap<String, String>>);

impl Record {
    /// Notes an answer. No question of a topic may be asked twice.
    pub fn note(&mut self, topic: impl Display, question: impl Display, answer: impl Display) {
        let (topic, question) = (topic.to_string(), question.to_string());
        let answers = self.0.entry(topic.clone()).or_default();
        let before = answers.insert(question.clone(), answer.to_string());
        assert!(
            before.is_none(),
            "{topic}: {question} was noted before, as {before:?}"
        );
    }

    /// Adds the answers of another record, to other questions.
    pub fn extend(&mut self, other: Self) {
        for (topic, answers) in other.0 {
            for (question, answer) in answers {
                self.note(&topic, question, answer);
            }
        }
    }

    /// How many answers there are.
    pub fn len(&self) -> usize {
        self.0.values().map(BTreeMap::len).sum()
    }

    /// Whether nothing was noted.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn get(&self, topic: &str, question: &str) -> Option<&str> {
        self.0.get(topic)?.get(question).map(String::as_str)
    }

    /// Fails unless `seen` answers the same questions in the same way. `excused` says which differences, by topic
    /// and question, do not matter.
    pub fn expect_same(
        &self,
        name: &str,
        seen: &Self,
        seen_name: &str,
        excused: impl Fn(&str, &str) -> bool,
    ) -> Result<()> {
        let questions = |record: &Self| {
            let pairs = record.0.iter().flat_map(|(topic, answers)| {
                answers
                    .keys()
                    .map(|question| (topic.clone(), question.clone()))
            });
            pairs.collect::<Vec<_>>()
        };
        let mut all = questions(self);
        all.extend(questions(seen));
        all.sort();
        all.dedup();
        all.retain(|(topic, question)| !excused(topic, question));
        self.expect(name, seen, seen_name, &all)
    }

    /// Fails unless `seen` has every answer that is in this record; it may have more.
    pub fn expect_within(&self, name: &str, seen: &Self, seen_name: &str) -> Result<()> {
        let all: Vec<_> = self
            .0
            .iter()
            .flat_map(|(topic, answers)| {
                answers
                    .keys()
                    .map(|question| (topic.clone(), question.clone()))
            })
            .collect();
        self.expect(name, seen, seen_name, &all)
    }

    fn expect(
        &self,
        name: &str,
        seen: &Self,
        seen_name: &str,
        questions: &[(String, String)],
    ) -> Result<()> {
        let mut topics: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (topic, question) in questions {
            let (one, other) = (self.get(topic, question), seen.get(topic, question));
            if !self.0.contains_key(topic) || !seen.0.contains_key(topic) {
                let who = if self.0.contains_key(topic) {
                    name
                } else {
                    seen_name
                };
                let lines = topics.entry(topic).or_default();
                if lines.is_empty() {
                    lines.push(format!("    only {who} has this"));
                }
            } else if one != other {
                let text = |answer: Option<&str>| match answer {
                    Some(answer) => answer.escape_debug().to_string(),
                    None => "(no answer)".to_owned(),
                };
                let (one, other) = differing_part(&text(one), &text(other));
                topics.entry(topic).or_default().push(format!(
                    "    {question}\n        {name}: {one}\n        {seen_name}: {other}"
                ));
            }
        }
        let count: usize = topics.values().map(Vec::len).sum();
        let report: Vec<String> = topics
            .into_iter()
            .map(|(topic, lines)| {
                let more = match lines.len().saturating_sub(SHOWN) {
                    0 => String::new(),
                    more => format!("\n    and {more} more"),
                };
                let shown = &lines[..lines.len().min(SHOWN)];
                format!("  {topic}\n{}{more}", shown.join("\n"))
            })
            .collect();
        ensure!(
            count == 0,
            "{name} and {seen_name} differ in {count} of {} answers:\n{}",
            questions.len(),
            report.join("\n")
        );
        Ok(())
    }
}

/// Two texts, without most of a long beginning that they share.
fn differing_part(one: &str, other: &str) -> (String, String) {
    const CONTEXT: usize = 40;
    const LONG: usize = 400;
    let same = one
        .chars()
        .zip(other.chars())
        .take_while(|(one, other)| one == other)
        .count();
    let skip = same.saturating_sub(CONTEXT);
    let part = |text: &str| {
        let mut part: String = text.chars().skip(skip).take(LONG).collect();
        if skip > 0 {
            part.insert(0, '…');
        }
        part
    };
    (part(one), part(other))
}
