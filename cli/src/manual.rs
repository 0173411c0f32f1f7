//! Parts of manual pages that the definition of the command line does not have.

/// Command lines by the command that they are examples of, each with what it does.
pub const EXAMPLES: &[(&str, &[(&str, &str)])] = &[
    (
        "device show",
        &[
            (
                "barlease device",
                "All PCI devices, their drivers and IOMMU groups.",
            ),
            (
                "barlease device show 01:00.0 --features",
                "One device, with the features that its driver has.",
            ),
        ],
    ),
    (
        "device bind",
        &[
            (
                "barlease device bind 01:00.0 01:00.1",
                "Both functions of a card, or neither.",
            ),
            (
                "barlease device bind --group --persist 01:00.0",
                "All that is in its IOMMU group, at each boot, too.",
            ),
        ],
    ),
    (
        "device alias",
        &[(
            "barlease device alias 01:00.0 --bar 2",
            "Where to map BAR 2 write-combining.",
        )],
    ),
    (
        "device reset",
        &[(
            "barlease device reset 01:00.0",
            "Fails while a program has it open.",
        )],
    ),
    (
        "device unbind",
        &[
            (
                "barlease device unbind 01:00.0",
                "Back to the driver that the kernel chooses.",
            ),
            ("barlease device unbind --persist 01:00.0", "And for good."),
        ],
    ),
    (
        "claim show",
        &[("barlease claim show", "The claims that are open.")],
    ),
    (
        "claim open",
        &[(
            "barlease claim open pod-1",
            "Prints the directory to mount into the container.",
        )],
    ),
    (
        "claim end",
        &[(
            "barlease claim end pod-1",
            "Nothing of it reaches the device any more when this returns.",
        )],
    ),
    (
        "cdi generate",
        &[(
            "barlease cdi generate pod-1 render=rows --output /var/run/cdi/barlease.json",
            "Then: podman run --device barlease.dev/lease=render IMAGE",
        )],
    ),
    (
        "lease show",
        &[(
            "barlease lease show 01:00.0 --pretty",
            "The leases of a device, as JSON to read.",
        )],
    ),
    (
        "lease grant",
        &[
            (
                "barlease lease grant 01:00.0 --bar 2 --range 1M+64K --user root --socket /run/l",
                "64 KiB for processes of one user, until the command is interrupted.",
            ),
            (
                "barlease lease grant 01:00.0 --bar 2 --term 2h \
                 --lease range=0+1M,user=root,socket=/run/a --lease range=1M+1M,socket=/run/b",
                "Two leases for two hours, each at a socket of its own.",
            ),
            (
                "barlease lease grant --file /etc/barlease/leases.toml --detach",
                "The leases of a file, in the background.",
            ),
        ],
    ),
    (
        "lease revoke",
        &[
            (
                "barlease lease revoke /run/lease",
                "Takes the lease of that socket away.",
            ),
            (
                "barlease lease revoke --no-wait --json /run/lease",
                "The same, not waiting for a device that has it imported.",
            ),
            (
                "barlease lease revoke --unit render@3.service --grace 0",
                "Takes all leases that a unit has of the service away, at once.",
            ),
        ],
    ),
    (
        "lease holders",
        &[
            (
                "barlease lease holders",
                "Each process with a lease or a VFIO device.",
            ),
            (
                "barlease lease holders 01:00.0",
                "The processes that have this device open.",
            ),
        ],
    ),
    (
        "lease acquire",
        &[
            (
                "barlease lease acquire rows 64K --wait 30s -- render",
                "A program with 64 KiB of a pool.",
            ),
            (
                "barlease lease acquire doorbells 4K --lifetime process -- sh -c \
                 'barlease lease read fd:$BARLEASE_FD 0'",
                "A program that reads its doorbell.",
            ),
        ],
    ),
    (
        "lease list",
        &[
            (
                "barlease lease list --pool rows",
                "The leases of a pool with their holders, and the requests in line.",
            ),
            (
                "barlease lease list --pretty",
                "All of it, as JSON to read.",
            ),
        ],
    ),
    (
        "lease watch",
        &[(
            "barlease lease watch --json",
            "The news of one's leases, a line each.",
        )],
    ),
    (
        "lease release",
        &[("barlease lease release 12", "Gives lease 12 back.")],
    ),
    (
        "lease renew",
        &[(
            "barlease lease renew 12 --ttl 10m",
            "Ten minutes more, from now on.",
        )],
    ),
    (
        "broker show",
        &[("barlease broker", "Devices and pools, with what is free.")],
    ),
    (
        "broker drain",
        &[(
            "barlease broker drain card --grace 5s",
            "Before the card is taken out: its leases have five seconds.",
        )],
    ),
    (
        "broker reload",
        &[(
            "barlease broker reload",
            "After the policy was changed; says what is wrong with it.",
        )],
    ),
    (
        "policy check",
        &[(
            "barlease policy check /etc/barlease/policy.d new.toml",
            "Whether what is there and a new file fit together.",
        )],
    ),
    (
        "policy explain",
        &[
            (
                "barlease policy explain --as-uid 1001 rows 64K",
                "Whether a user would get 64 KiB now, and by which rule.",
            ),
            (
                "barlease policy explain --policy new.toml --unit render@1.service rows",
                "The same of a file that is not in force, for a unit.",
            ),
        ],
    ),
    (
        "policy schema",
        &[(
            "barlease policy schema",
            "For an editor that checks while one types.",
        )],
    ),
    (
        "top",
        &[
            ("barlease top", "The service, once a second."),
            ("barlease top --once", "One picture, as text."),
        ],
    ),
    (
        "monitor",
        &[(
            "barlease monitor",
            "Grants, refusals, ends: all that the service does.",
        )],
    ),
    (
        "lease take",
        &[(
            "barlease lease take /run/lease -- sh -c 'barlease lease read fd:$BARLEASE_FD 0'",
            "A program that inherits the lease.",
        )],
    ),
    (
        "lease dump",
        &[(
            "barlease lease dump /run/lease --range 0+256",
            "The first 256 bytes.",
        )],
    ),
    (
        "lease read",
        &[(
            "barlease lease read /run/lease 0x10 --width 8",
            "One access of 8 bytes.",
        )],
    ),
    (
        "lease fill",
        &[(
            "barlease lease fill /run/lease 0 --range 0+4K",
            "Clears a page.",
        )],
    ),
    (
        "lease write",
        &[(
            "barlease lease write /run/lease 0x10 1",
            "One access of 4 bytes.",
        )],
    ),
    (
        "doctor",
        &[
            ("barlease doctor 01:00.0", "Checks the host, and a device."),
            (
                "barlease doctor 01:00.0 --peer 02:00.0",
                "Whether 02:00.0 can import leases of it, by which way, and why not.",
            ),
        ],
    ),
];

/// Exit codes and their meanings.
pub const EXIT_STATUS: &[(&str, &str)] = &[
    ("0", "Success."),
    (
        "1",
        "Failure: no such device, no permission, in use, a dead lease, a value that the device \
         refuses; of doctor: something does not work; \
         of policy: it is not valid, or refuses.",
    ),
    ("2", "Wrong usage."),
    (
        "3",
        "The driver, kernel or device does not have what is asked for: another driver is bound, \
         the module is not loaded.",
    ),
    ("128+N", "Signal N ended it: 130 SIGINT, 143 SIGTERM."),
    ("141", "Nobody reads the output any more."),
];

/// Variables of the environment that the command sets or heeds.
pub const ENVIRONMENT: &[(&str, &str)] = &[
    (
        "BARLEASE_FD",
        "Set by lease take and lease acquire for the program that they run: the number of the \
         descriptor of the lease.",
    ),
    (
        "BARLEASE_LEASE",
        "Set by lease acquire for the program that it runs: the number of the lease.",
    ),
    (
        "BARLEASE_SOCKET",
        "The socket of the service, where --service does not say it; set in containers.",
    ),
    ("NO_COLOR", "Not empty: top uses no colours."),
];

/// Files and folders that the command uses.
pub const FILES: &[(&str, &str)] = &[
    (
        "SOCKET.control",
        "Beside the socket of each lease that is granted: for lease revoke, for the user that \
         grants it and root.",
    ),
    (
        "/etc/udev/rules.d/70-barlease-BDF.rules",
        "A device that device bind --persist binds at each boot.",
    ),
    ("/etc/barlease/policy.d", "The policy of the service."),
    ("/run/barleased/leases.sock", "The socket of the service."),
    ("/dev/vfio", "Devices of VFIO."),
    (
        "/sys/kernel/debug/barlease",
        "The source of lease show: for root.",
    ),
    (
        "/sys/kernel/debug/dma_buf/bufinfo",
        "Where lease holders learns of leases that are only mapped: for root.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    /// Words of a line; one in quotes is one.
    fn words(line: &str) -> Vec<String> {
        let pieces = line.split('\'').enumerate();
        let split = pieces.flat_map(|(n, piece)| match n % 2 {
            0 => piece.split_whitespace().map(str::to_owned).collect(),
            _ => vec![piece.to_owned()],
        });
        split.collect()
    }

    #[test]
    fn each_command_has_examples_and_they_are_understood() {
        let mut commands = Vec::new();
        for object in crate::command().get_subcommands() {
            let name = object.get_name();
            commands.extend(
                object
                    .get_subcommands()
                    .map(|command| format!("{name} {}", command.get_name())),
            );
            if !object.has_subcommands() {
                commands.push(name.to_owned());
            }
        }
        commands.sort();
        let mut documented: Vec<_> = EXAMPLES
            .iter()
            .map(|(name, _)| (*name).to_owned())
            .collect();
        documented.sort();
        assert_eq!(commands, documented);
        for (name, examples) in EXAMPLES {
            assert!(!examples.is_empty(), "{name}");
            for (line, _) in *examples {
                crate::args::Args::try_parse_from(words(line)).unwrap();
            }
        }
    }
}
