//! The Container Device Interface: a file that tells podman, docker, containerd and CRI-O what a
//! container gets with a device. Here a device is a claim, and brings the directory
//! of its socket: the socket itself would be a dead one after a restart of the service.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use crate::args::CdiCommand;
use crate::claim;
use crate::failure::Failure;
use crate::output::Output;
use crate::service::args::Service;

/// Of the specification: mounts and environment are all that is needed of it.
const VERSION: &str = "0.6.0";
const KIND: &str = "barlease.dev/lease";
/// Where a container has the directories of its claims.
const INSIDE: &str = "/run/barlease";

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Specification {
    cdi_version: &'static str,
    kind: &'static str,
    devices: Vec<Device>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    container_edits: Edits,
}

#[derive(Debug, Serialize)]
struct Edits {
    env: Vec<String>,
    mounts: Vec<Mount>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Mount {
    host_path: String,
    container_path: String,
    options: [&'static str; 5],
}

/// A claim, and the pool that its container is told.
fn parts(claim: &str) -> (&str, Option<&str>) {
    match claim.split_once('=') {
        Some((claim, pool)) => (claim, Some(pool)),
        None => (claim, None),
    }
}

fn device(claim: &str, pool: Option<&str>, directory: String) -> Device {
    let inside = format!("{INSIDE}/{claim}");
    let mut env = vec![format!("BARLEASE_SOCKET={inside}/sock")];
    env.extend(pool.map(|pool| format!("BARLEASE_POOL={pool}")));
    Device {
        name: claim.to_owned(),
        container_edits: Edits {
            env,
            mounts: vec![Mount {
                host_path: directory,
                container_path: inside,
                // A socket in a file system that is mounted for reading can be connected to.
                options: ["ro", "rbind", "nosuid", "nodev", "noexec"],
            }],
        },
    }
}

pub(crate) fn run(command: CdiCommand, output: Output) -> Result<ExitCode, Failure> {
    let CdiCommand::Generate {
        claims,
        output: file,
        service,
    } = command;
    generate(&claims, file.as_deref(), &service, output)?;
    Ok(ExitCode::SUCCESS)
}

/// Has the service make the directories, and writes the file, or prints it.
fn generate(
    claims: &[String],
    file: Option<&Path>,
    service: &Service,
    output: Output,
) -> Result<(), Failure> {
    let mut devices = Vec::new();
    for written in claims {
        let (name, pool) = parts(written);
        let directory = claim::open(service, name)?;
        devices.push(device(name, pool, directory));
    }
    let specification = Specification {
        cdi_version: VERSION,
        kind: KIND,
        devices,
    };
    let Some(file) = file else {
        let output = match output {
            Output::Json => Output::Json,
            Output::Text | Output::Pretty => Output::Pretty,
        };
        return Ok(output.document(&specification)?);
    };
    let failed = |error: std::io::Error| Failure::file("write", file, &error);
    let mut text = serde_json::to_vec_pretty(&specification).map_err(|e| failed(e.into()))?;
    text.push(b'\n');
    // In one step: an engine that reads the directory meanwhile finds the old file or the new one,
    // and passes over what does not end in `.json`.
    let folder = file
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    fs::create_dir_all(folder.unwrap_or(Path::new("."))).map_err(failed)?;
    let new = file.with_extension("json.new");
    let mut unfinished = fs::File::create(&new).map_err(failed)?;
    unfinished.write_all(&text).map_err(failed)?;
    fs::rename(&new, file).map_err(failed)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// The rules of the schema of CDI 0.6.0 for what we use (cdi/schema/schema.json, defs.json,
    /// and the names that pkg/parser checks).
    fn is_valid(spec: &Value) -> Result<(), String> {
        let keys = |value: &Value, allowed: &[&str]| {
            let object = value.as_object().ok_or("not an object")?;
            match object.keys().find(|key| !allowed.contains(&key.as_str())) {
                Some(key) => Err(format!("additional property {key}")),
                None => Ok(()),
            }
        };
        let text = |value: &Value| {
            value
                .as_str()
                .map(str::to_owned)
                .ok_or("not a string".to_owned())
        };
        keys(
            spec,
            &[
                "cdiVersion",
                "kind",
                "annotations",
                "devices",
                "containerEdits",
            ],
        )?;
        let version = text(&spec["cdiVersion"])?;
        let numbers: Vec<_> = version.split('.').map(str::parse::<u32>).collect();
        if numbers.len() != 3 || numbers.iter().any(Result::is_err) {
            return Err(format!("version {version}"));
        }
        let kind = text(&spec["kind"])?;
        let (vendor, class) = kind.split_once('/').ok_or("kind has no class")?;
        for part in [vendor, class] {
            let inner = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            let ends = part.starts_with(|c: char| c.is_ascii_alphabetic())
                && part.ends_with(|c: char| c.is_ascii_alphanumeric());
            if !ends || !part.chars().all(inner) {
                return Err(format!("kind {kind}"));
            }
        }
        let devices = spec["devices"].as_array().ok_or("devices is no list")?;
        if devices.is_empty() {
            return Err("no device".to_owned());
        }
        let mut names = std::collections::BTreeSet::new();
        for device in devices {
            keys(device, &["name", "annotations", "containerEdits"])?;
            let name = text(&device["name"])?;
            let inner = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
            let end = |c: char| c.is_ascii_alphanumeric();
            if !name.starts_with(end) || !name.ends_with(end) || !name.chars().all(inner) {
                return Err(format!("device name {name}"));
            }
            if !names.insert(name.clone()) {
                return Err(format!("device {name} comes twice"));
            }
            let edits = &device["containerEdits"];
            keys(
                edits,
                &[
                    "env",
                    "deviceNodes",
                    "mounts",
                    "hooks",
                    "intelRdt",
                    "additionalGids",
                ],
            )?;
            for variable in edits["env"].as_array().ok_or("env is no list")? {
                if text(variable)?
                    .split_once('=')
                    .is_none_or(|(name, _)| name.is_empty())
                {
                    return Err(format!("variable {variable}"));
                }
            }
            for mount in edits["mounts"].as_array().ok_or("mounts is no list")? {
                keys(mount, &["hostPath", "containerPath", "options", "type"])?;
                for path in ["hostPath", "containerPath"] {
                    if !text(&mount[path])?.starts_with('/') {
                        return Err(format!("{path} of {mount}"));
                    }
                }
                let options = mount["options"].as_array().ok_or("options is no list")?;
                if options.iter().any(|option| !option.is_string()) {
                    return Err("an option is no text".to_owned());
                }
            }
        }
        Ok(())
    }

    fn specification(claims: &[&str]) -> Value {
        let devices = claims.iter().map(|claim| {
            let (claim, pool) = parts(claim);
            device(claim, pool, format!("/run/barleased/claims/{claim}"))
        });
        serde_json::to_value(Specification {
            cdi_version: VERSION,
            kind: KIND,
            devices: devices.collect(),
        })
        .unwrap()
    }

    #[test]
    fn a_specification_follows_the_schema() {
        let spec = specification(&["pod-1", "render=rows"]);
        is_valid(&spec).unwrap();
        assert_eq!(
            spec["devices"][1],
            serde_json::json!({
                "name": "render",
                "containerEdits": {
                    "env": [
                        "BARLEASE_SOCKET=/run/barlease/render/sock",
                        "BARLEASE_POOL=rows",
                    ],
                    "mounts": [{
                        "hostPath": "/run/barleased/claims/render",
                        "containerPath": "/run/barlease/render",
                        "options": ["ro", "rbind", "nosuid", "nodev", "noexec"],
                    }],
                },
            })
        );
        assert_eq!(
            spec["devices"][0]["containerEdits"]["env"]
                .as_array()
                .unwrap()
                .len(),
            1
        );
    }

    #[test]
    fn what_breaks_the_schema_is_found() {
        for wrong in [&[][..], &["a", "a"], &["-a"], &["a/b"]] {
            assert!(is_valid(&specification(wrong)).is_err(), "{wrong:?}");
        }
        let mut other = specification(&["a"]);
        other["devices"][0]["mounts"] = serde_json::json!([]);
        assert!(is_valid(&other).is_err());
    }
}
