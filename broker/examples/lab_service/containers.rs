//! Containers that get leases by claims: podman, and containerd as the kubelet asks it, through CRI.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use barlease_proto::LeaseInfo;

use super::Lab;
use super::PAGE;
use super::POLICY;
use super::UNIT;
use super::another;
use super::attempt;
use super::client;
use super::pid;
use super::run;
use super::signal;
use super::until;

const IMAGE: &str = "localhost/tenant:1";
/// Of the image, for an engine that has none of podman's storage.
const ARCHIVE: &str = "/tmp/tenant.tar";
const SPECIFICATION: &str = "/var/run/cdi/barlease.json";
const CRI: &str = "/tmp/cri.py";
/// Two claims; the containers have their names.
const ONE: &str = "box-1";
const TWO: &str = "box-2";
/// No driver of the kernel's is needed for these kinds of storage.
const STORAGE: &str = "[storage]\ndriver = \"vfs\"\nrunroot = \"/run/containers/storage\"\n\
                       graphroot = \"/var/lib/containers/storage\"\n";
const CONTAINERD: &str = "version = 3\n\
                          [plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'native'\n\
                          [plugins.'io.containerd.cri.v1.images'.pinned_images]\n\
                          sandbox = 'localhost/tenant:1'\n";
/// The container's program: asks for a lease, and writes to it until that is lost.
const TENANT: &str = "#!/bin/sh\nexec barlease lease acquire \"$BARLEASE_POOL\" 8K --lifetime claim -- \
                      /bin/writer\n";
/// Its count goes on from the time of day, so that a successor counts on from more.
const WRITER: &str = "#!/bin/sh\ncount=$(($(date +%s) * 100))\n\
                      while barlease lease write fd:$BARLEASE_FD 0 $((count % 1000000)); do\n\
                      count=$((count + 1))\necho $count >/tmp/count.new\n\
                      mv /tmp/count.new /tmp/count\nsleep 0.1\ndone\n\
                      echo lost >/tmp/count\nexec sleep 100000\n";

/// Something that runs containers.
trait Engine {
    /// Has it running, with the image.
    fn prepare(&self);
    /// Starts a container with a claim, of the same name.
    fn start(&self, claim: &str) -> (bool, String);
    /// Runs something in it.
    fn inside(&self, claim: &str, words: &[&str]) -> (bool, String);
    /// Ends its processes, and starts it again.
    fn restart(&self, claim: &str) -> (bool, String);
    fn remove(&self, claim: &str);
    /// Restarts the engine itself, if it is a service.
    fn restarts_itself(&self) -> bool;
}

struct Podman;

impl Engine for Podman {
    fn prepare(&self) {}

    fn start(&self, claim: &str) -> (bool, String) {
        let device = device(claim);
        let words = [
            "podman",
            "run",
            "--detach",
            "--network",
            "none",
            "--name",
            claim,
        ];
        attempt(&[&words[..], &["--device", &device, IMAGE, "tenant"]].concat())
    }

    fn inside(&self, claim: &str, words: &[&str]) -> (bool, String) {
        attempt(&[&["podman", "exec", claim], words].concat())
    }

    fn restart(&self, claim: &str) -> (bool, String) {
        attempt(&["podman", "restart", "--time", "0", claim])
    }

    fn remove(&self, claim: &str) {
        run(&["podman", "rm", "--force", "--time", "0", claim]);
    }

    fn restarts_itself(&self) -> bool {
        false
    }
}

struct Containerd;

impl Engine for Containerd {
    fn prepare(&self) {
        fs::write(CRI, include_str!("cri.py")).unwrap();
        fs::create_dir_all("/etc/containerd").unwrap();
        fs::write("/etc/containerd/config.toml", CONTAINERD).unwrap();
        run(&["systemctl", "restart", "containerd.service"]);
        let import = [
            "ctr",
            "--namespace",
            "k8s.io",
            "images",
            "import",
            "--local",
        ];
        run(&[&import[..], &["--snapshotter", "native", ARCHIVE]].concat());
    }

    fn start(&self, claim: &str) -> (bool, String) {
        attempt(&[
            "python3",
            CRI,
            "run",
            claim,
            IMAGE,
            &device(claim),
            "tenant",
        ])
    }

    fn inside(&self, claim: &str, words: &[&str]) -> (bool, String) {
        attempt(&[&["python3", CRI, "exec", claim], words].concat())
    }

    fn restart(&self, claim: &str) -> (bool, String) {
        attempt(&["python3", CRI, "restart", claim])
    }

    fn remove(&self, claim: &str) {
        run(&["python3", CRI, "remove", claim]);
    }

    fn restarts_itself(&self) -> bool {
        run(&["systemctl", "restart", "containerd.service"]);
        true
    }
}

fn device(claim: &str) -> String {
    format!("barlease.dev/lease={claim}")
}

/// A file system with the command and a shell, as an image of both engines.
fn make_image() {
    let bin = Path::new("/tmp/image/bin");
    fs::create_dir_all(bin).unwrap();
    fs::create_dir_all("/tmp/image/tmp").unwrap();
    fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
    for name in ["sh", "sleep", "cat", "mv", "date", "true"] {
        symlink("busybox", bin.join(name)).unwrap();
    }
    fs::copy("/lab/bin/barlease", bin.join("barlease")).unwrap();
    for (name, text) in [("tenant", TENANT), ("writer", WRITER)] {
        fs::write(bin.join(name), text).unwrap();
        run(&["chmod", "755", &format!("/tmp/image/bin/{name}")]);
    }
    fs::create_dir_all("/etc/containers").unwrap();
    fs::write("/etc/containers/storage.conf", STORAGE).unwrap();
    run(&[
        "tar",
        "--create",
        "--file",
        "/tmp/root.tar",
        "--directory",
        "/tmp/image",
        ".",
    ]);
    let change = "CMD [\"/bin/sleep\", \"100000\"]";
    run(&[
        "podman",
        "import",
        "--change",
        change,
        "/tmp/root.tar",
        IMAGE,
    ]);
    let save = [
        "podman",
        "save",
        "--format",
        "docker-archive",
        "--output",
        ARCHIVE,
        IMAGE,
    ];
    run(&save);
}

/// The leases of a claim.
fn leases(claim: &str) -> Vec<LeaseInfo> {
    let mut leases = client().list(None).unwrap();
    leases.retain(|lease| lease.holder.claim.as_deref() == Some(claim));
    leases
}

fn written(engine: &dyn Engine, claim: &str) -> Option<u64> {
    let (_, said) = engine.inside(claim, &["cat", "/tmp/count"]);
    said.lines().next()?.parse().ok()
}

/// The container's writes go on, and arrive.
fn goes_on(engine: &dyn Engine, claim: &str) {
    let mut before = None;
    until("the container begins to write", || {
        before = written(engine, claim);
        before.is_some()
    });
    until("its writes go on", || written(engine, claim) > before);
}

fn must((done, said): (bool, String)) {
    assert!(done, "{said}");
}

/// The command in a container that runs, which asks by the claim's socket: podman gives what CDI adds to the
/// environment to the container's own process, and not to what is run in it later.
fn asks(engine: &dyn Engine, claim: &str, words: &[&str]) -> (bool, String) {
    let socket = format!("/run/barlease/{claim}/sock");
    let (command, then) = words.split_at(words.iter().take_while(|word| **word != "--").count());
    let service = ["--service", socket.as_str()];
    engine.inside(claim, &[&["barlease"], command, &service, then].concat())
}

/// Another lease, from inside, which goes back at once.
fn gets_another(engine: &dyn Engine, claim: &str) -> (bool, String) {
    asks(
        engine,
        claim,
        &["lease", "acquire", "rows", "4K", "--", "true"],
    )
}

impl Lab {
    /// All of it, with each engine.
    pub(crate) fn containers(&self) {
        let text = fs::read_to_string(POLICY).unwrap();
        let rule = "[[allow]]\npools = [\"rows\"]\nwho = { claim = \"box-*\" }\naccess = \"read-write\"\n\
                    lifetime = [\"claim\", \"connection\"]\nmax-bytes = \"16K\"\n";
        fs::write(POLICY, text + rule).unwrap();
        run(&["systemctl", "reload", UNIT]);
        println!("an image");
        make_image();
        for (name, engine) in [
            ("podman", &Podman as &dyn Engine),
            ("containerd", &Containerd),
        ] {
            println!("{name}");
            engine.prepare();
            self.contained(engine);
        }
    }

    fn contained(&self, engine: &dyn Engine) {
        println!("- a container leases by its claim");
        let claims = [ONE, TWO].map(|claim| format!("{claim}=rows"));
        let generate = ["barlease", "cdi", "generate", &claims[0], &claims[1]];
        run(&[&generate[..], &["--output", SPECIFICATION]].concat());
        must(engine.start(ONE));
        goes_on(engine, ONE);
        let had = leases(ONE);
        assert_eq!((had.len(), had[0].size), (1, 2 * PAGE));

        println!("- another one has another claim, and sees nothing of it");
        must(engine.start(TWO));
        goes_on(engine, TWO);
        let (_, listed) = asks(engine, TWO, &["lease", "list", "--json"]);
        let number = |lease: u64| format!("\"lease\":{lease},");
        let theirs = leases(TWO)[0].lease;
        let listed: String = listed.split_whitespace().collect();
        assert!(listed.contains(&number(theirs)), "{listed}");
        assert!(!listed.contains(&number(had[0].lease)), "{listed}");

        println!("- no container is an administrator, and limits are those of its claim");
        let (done, said) = asks(engine, ONE, &["broker", "drain"]);
        assert!(!done, "{said}");
        let more = ["lease", "acquire", "rows", "12K", "--", "true"];
        let (done, said) = asks(engine, ONE, &more);
        assert!(!done && said.contains("limit"), "{said}");

        println!("- the service is killed, and stopped and started");
        let before = pid();
        signal(before, "KILL");
        another(before);
        goes_on(engine, ONE);
        must(gets_another(engine, ONE));
        run(&["systemctl", "stop", UNIT, "barleased.socket"]);
        goes_on(engine, ONE);
        run(&["systemctl", "start", "barleased.socket", UNIT]);
        goes_on(engine, ONE);
        must(gets_another(engine, ONE));
        assert_eq!(leases(ONE)[0].lease, had[0].lease);

        if engine.restarts_itself() {
            println!("- the engine is restarted");
            goes_on(engine, ONE);
            must(gets_another(engine, ONE));
        }

        println!("- the container is restarted");
        must(engine.restart(ONE));
        goes_on(engine, ONE);
        until("the lease of its predecessor has ended", || {
            let now = leases(ONE);
            now.len() == 1 && now[0].lease != had[0].lease
        });

        println!("- the claim ends");
        run(&["barlease", "claim", "end", ONE]);
        assert!(leases(ONE).is_empty());
        let lost = || {
            engine
                .inside(ONE, &["cat", "/tmp/count"])
                .1
                .starts_with("lost")
        };
        until("its memory is gone", lost);
        let (done, said) = gets_another(engine, ONE);
        assert!(!done, "{said}");
        goes_on(engine, TWO);

        println!("- without its claim the container does not start");
        let (done, said) = engine.restart(ONE);
        assert!(!done, "{said}");

        println!("- a successor of the same name has nothing of its predecessor");
        run(&["barlease", "claim", "open", ONE]);
        engine.remove(ONE);
        must(engine.start(ONE));
        goes_on(engine, ONE);
        for claim in [ONE, TWO] {
            engine.remove(claim);
            until("its leases end with the container", || {
                leases(claim).is_empty()
            });
            run(&["barlease", "claim", "end", claim]);
        }
    }
}
