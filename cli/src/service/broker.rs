//! `barlease broker`.

use barlease_proto::DeviceInfo;
use barlease_proto::Devices;
use barlease_proto::Drain;
use barlease_proto::Error;
use barlease_proto::PoolInfo;
use barlease_proto::Refusal;
use barlease_proto::Reload;
use serde_json::json;

use super::args::BrokerCommand;
use super::args::milliseconds;
use crate::failure::Failure;
use crate::output::Output;
use crate::output::or_dash;
use crate::output::print;
use crate::output::table;

pub(crate) fn broker(command: BrokerCommand, output: Output) -> Result<(), Failure> {
    match command {
        BrokerCommand::Show { service } => {
            let devices = super::connect(&service.socket)?
                .call(&Devices {})
                .map_err(|error| super::failed("show", "devices", error))?;
            if let Some(errors) = &devices.policy_errors {
                eprintln!(
                    "barlease: the policy's files are wrong, and an older policy is in force:\n{}",
                    errors.join("\n")
                );
            }
            show(&devices.devices, output)
        }
        BrokerCommand::Drain {
            device,
            grace,
            service,
        } => {
            let object = device.clone().unwrap_or_else(|| "all devices".to_owned());
            let grace = grace.map(milliseconds);
            super::connect(&service.socket)?
                .call(&Drain { device, grace })
                .map_err(|error| super::failed("drain", &object, error))?;
            Ok(())
        }
        BrokerCommand::Reload { service } => super::connect(&service.socket)?
            .call(&Reload {})
            .map(drop)
            .map_err(|error| match error {
                Error::Refused(refusal) => match *refusal {
                    // An error a line.
                    Refusal::PolicyInvalid { errors } => Failure::new(format!(
                        "reload: policy: the old one stays in force:\n{}",
                        errors.join("\n")
                    ))
                    .with_details(json!({"errors": errors})),
                    other => super::failed("reload", "policy", Error::Refused(Box::new(other))),
                },
                error => super::failed("reload", "policy", error),
            }),
    }
}

fn show(devices: &[DeviceInfo], output: Output) -> Result<(), Failure> {
    if output.is_json() {
        let pool = |pool: &PoolInfo| {
            json!({
                "name": pool.name, "bar": pool.bar, "at": pool.at, "length": pool.length,
                "unit": pool.unit, "size": pool.size, "free": pool.free, "waiting": pool.waiting,
            })
        };
        let device = |device: &DeviceInfo| {
            json!({
                "name": device.name, "bdf": device.address, "state": device.state,
                "bars": device.bars,
                "pools": device.pools.iter().map(pool).collect::<Vec<_>>(),
            })
        };
        let devices: Vec<_> = devices.iter().map(device).collect();
        return Ok(output.document(&devices)?);
    }
    let mut table = table([
        "DEVICE", "BDF", "STATE", "POOL", "BAR", "RANGE", "UNIT", "SIZE", "FREE", "WAITING",
    ]);
    for device in devices {
        let head = [
            device.name.clone(),
            or_dash(device.address.as_ref()),
            device.state.clone(),
        ];
        if device.pools.is_empty() {
            let none = std::iter::repeat_n("-".to_owned(), 7);
            table.add_row(head.iter().cloned().chain(none));
        }
        for pool in &device.pools {
            let cells = [
                pool.name.clone(),
                pool.bar.to_string(),
                format!("{:#x}+{:#x}", pool.at, pool.length),
                format!("{:#x}", pool.unit),
                format!("{:#x}", pool.size),
                format!("{:#x}", pool.free),
                pool.waiting.to_string(),
            ];
            table.add_row(head.iter().cloned().chain(cells));
        }
    }
    Ok(print(&table)?)
}
