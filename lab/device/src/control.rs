//! Control at run time: a JSON value for a JSON object.
//!
//! The table of requests is in the doc of [`Server::ask`](crate::Server::ask).

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::device::Device;
use crate::log::Query;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    Mark(String),
    Clear,
    Query(Query),
    State,
    Set(Change),
}

/// The changes to make. A field that is absent stays.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Change {
    /// Play dead: all reads give ones, writes do nothing.
    dead: Option<bool>,
    /// How long resets take from now on.
    reset_ms: Option<u64>,
    /// Whether resets do not end; false also ends one that is going on.
    reset_fails: Option<bool>,
    /// See [`Options::completer`](crate::Options::completer).
    completer: Option<u8>,
}

/// Does what is asked.
pub(crate) fn answer(device: &mut Device, request: &str) -> Value {
    match serde_json::from_str(request) {
        Ok(request) => carry_out(device, request),
        Err(error) => json!({"error": format!("{error}: {request}")}),
    }
}

fn carry_out(device: &mut Device, request: Request) -> Value {
    match request {
        Request::Mark(text) => json!({"seq": device.mark(&text)}),
        Request::Clear => {
            device.log.clear();
            json!({"seq": device.log.last()})
        }
        Request::Query(query) => {
            // The end of a reset may not have been noticed.
            device.state();
            let (count, entries) = device.log.query(&query);
            json!({"count": count, "entries": entries})
        }
        Request::State => json!(device.state()),
        Request::Set(change) => {
            if let Some(dead) = change.dead {
                device.dead = dead;
            }
            if let Some(time) = change.reset_ms {
                device.reset_time = Duration::from_millis(time);
            }
            match change.reset_fails {
                Some(true) => device.reset_fails = true,
                Some(false) => device.mend(),
                None => {}
            }
            if let Some(completer) = change.completer {
                device.set_completer(completer);
            }
            json!({"ok": true})
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::Options;

    fn asked(device: &mut Device, request: &str) -> String {
        answer(device, request).to_string()
    }

    /// The order of members is not ours: it depends on a feature of serde_json.
    fn parsed(reply: &str) -> serde_json::Value {
        serde_json::from_str(reply).unwrap()
    }

    #[test]
    fn requests_are_answered() {
        let mut device = Device::new(&Options::default(), None).unwrap();
        assert_eq!(asked(&mut device, r#"{"mark":"here"}"#), r#"{"seq":1}"#);
        let reply = asked(&mut device, r#"{"query":{"kind":"mark"}}"#);
        assert!(
            reply.contains(r#""count":1"#) && reply.contains(r#""text":"here""#),
            "{reply}"
        );
        assert_eq!(asked(&mut device, r#""clear""#), r#"{"seq":1}"#);
        let reply = asked(&mut device, r#"{"query":{}}"#);
        assert_eq!(parsed(&reply), json!({"count": 0, "entries": []}));
        let reply = asked(&mut device, r#"{"set":{"dead":true,"reset_ms":70}}"#);
        assert_eq!(reply, r#"{"ok":true}"#);
        assert_eq!(device.reset_time, Duration::from_millis(70));
        let reply = asked(&mut device, r#""state""#);
        assert_eq!(
            parsed(&reply),
            json!({"dead": true, "memory": false, "power": 0, "reset": false})
        );
    }

    #[test]
    fn a_slip_is_refused_and_changes_nothing() {
        let mut device = Device::new(&Options::default(), None).unwrap();
        for request in [
            "",
            "{}",
            r#"{"set":{"daed":true}}"#,
            r#"{"query":{"op":"x"}}"#,
        ] {
            let reply = asked(&mut device, request);
            assert!(reply.starts_with(r#"{"error":"#), "{reply}");
        }
        assert!(!device.dead);
    }
}
