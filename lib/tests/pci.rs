//! Binding, against a directory that looks like sysfs and a thread that plays the kernel.

use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::path::PathBuf;

use barlease::Bdf;
use barlease::Error;
use barlease::OpenOptions;
use barlease::pci::Pci;

/// A sysfs with one device, at first bound to `nvme`.
struct Fake {
    root: tempfile::TempDir,
    bdf: Bdf,
}

impl Fake {
    /// `stubborn`: the driver `barlease-vfio-pci` refuses every device.
    fn new(stubborn: bool) -> Self {
        let fake = Self {
            root: tempfile::tempdir().unwrap(),
            bdf: "00:05.0".parse().unwrap(),
        };
        let device = fake.device();
        fs::create_dir_all(&device).unwrap();
        for (name, value) in [
            ("vendor", "0x1234\n"),
            ("device", "0x1111\n"),
            ("class", "0x038000\n"),
            ("numa_node", "-1\n"),
            ("driver_override", "(null)\n"),
        ] {
            fs::write(device.join(name), value).unwrap();
        }
        fs::create_dir_all(fake.path("kernel/iommu_groups/4/devices")).unwrap();
        symlink(
            fake.path("kernel/iommu_groups/4"),
            device.join("iommu_group"),
        )
        .unwrap();
        symlink(
            &device,
            fake.path("kernel/iommu_groups/4/devices/0000:00:05.0"),
        )
        .unwrap();
        for driver in ["nvme", "vfio-pci", "barlease-vfio-pci"] {
            let path = fake.driver(driver);
            fs::create_dir_all(&path).unwrap();
            fifo(&path.join("unbind"));
            let device = device.clone();
            serve(path.join("unbind"), move |_| {
                fs::remove_file(device.join("driver")).unwrap();
            });
        }
        symlink(fake.driver("nvme"), device.join("driver")).unwrap();

        fifo(&fake.path("bus/pci/drivers_probe"));
        let drivers = fake.path("bus/pci/drivers");
        serve(fake.path("bus/pci/drivers_probe"), move |_| {
            let wanted = fs::read_to_string(device.join("driver_override")).unwrap();
            let driver = match wanted.trim() {
                "" | "(null)" => "nvme",
                "barlease-vfio-pci" if stubborn => return,
                driver => driver,
            };
            if !device.join("driver").exists() {
                symlink(drivers.join(driver), device.join("driver")).unwrap();
            }
        });
        fake
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn device(&self) -> PathBuf {
        self.path("bus/pci/devices/0000:00:05.0")
    }

    fn driver(&self, name: &str) -> PathBuf {
        self.path("bus/pci/drivers").join(name)
    }

    fn pci(&self) -> Pci {
        Pci::at(self.root.path())
    }

    fn bound_to(&self) -> Option<String> {
        self.pci().device(self.bdf).unwrap().driver
    }

    fn wait_for(&self, driver: Option<&str>) {
        for _ in 0..200 {
            if self.bound_to().as_deref() == driver {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert_eq!(self.bound_to().as_deref(), driver);
    }
}

fn fifo(path: &Path) {
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
}

/// Calls `act` for everything that is written to the fifo, until the directory is gone.
fn serve(path: PathBuf, act: impl Fn(&str) + Send + 'static) {
    std::thread::spawn(move || {
        while let Ok(mut file) = fs::File::open(&path) {
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            act(&text);
        }
    });
}

#[test]
fn a_device_is_listed_with_what_sysfs_says() {
    let fake = Fake::new(false);
    let devices = fake.pci().devices().unwrap();
    assert_eq!(devices.len(), 1);
    let device = &devices[0];
    assert_eq!((device.vendor, device.device), (0x1234, 0x1111));
    assert_eq!(device.class, 0x03_8000);
    assert_eq!(device.driver.as_deref(), Some("nvme"));
    assert_eq!(device.driver_override, None);
    assert_eq!(device.iommu_group, Some(4));
    assert_eq!(device.numa_node, None);
    assert!(!device.is_vfio());
}

#[test]
fn binding_takes_the_device_from_its_driver_and_unbinding_gives_it_back() {
    let fake = Fake::new(false);
    let pci = fake.pci();
    pci.bind(fake.bdf, "barlease-vfio-pci").unwrap();
    assert_eq!(fake.bound_to().as_deref(), Some("barlease-vfio-pci"));
    // Again: nothing to do.
    pci.bind(fake.bdf, "barlease-vfio-pci").unwrap();
    pci.bind(fake.bdf, "vfio-pci").unwrap();
    assert_eq!(fake.bound_to().as_deref(), Some("vfio-pci"));

    pci.unbind(fake.bdf).unwrap();
    fake.wait_for(Some("nvme"));
    assert_eq!(pci.device(fake.bdf).unwrap().driver_override, None);
}

#[test]
fn a_driver_that_refuses_leaves_the_device_where_it_was() {
    let fake = Fake::new(true);
    let error = fake.pci().bind(fake.bdf, "barlease-vfio-pci").unwrap_err();
    assert!(error.to_string().contains("did not take"), "{error}");
    assert_eq!(fake.bound_to().as_deref(), Some("nvme"));
    let device = fake.pci().device(fake.bdf).unwrap();
    assert_eq!(device.driver_override, None);
}

#[test]
fn a_driver_that_is_not_loaded_is_refused_before_anything_is_changed() {
    let fake = Fake::new(false);
    let error = fake.pci().bind(fake.bdf, "mlx5_vfio_pci").unwrap_err();
    assert!(error.to_string().contains("not loaded"), "{error}");
    assert_eq!(fake.bound_to().as_deref(), Some("nvme"));
}

#[test]
fn a_path_is_no_name_of_a_driver() {
    let fake = Fake::new(false);
    for name in ["../nvme", "", ".", "a/b"] {
        let error = fake.pci().bind(fake.bdf, name).unwrap_err();
        assert!(error.to_string().contains("no name"), "{error}");
    }
}

#[test]
fn a_device_whose_ids_cannot_be_read_is_going_away() {
    for value in ["", "0x12345\n", "vendor\n"] {
        let fake = Fake::new(false);
        fs::write(fake.device().join("vendor"), value).unwrap();
        let error = fake.pci().device(fake.bdf).unwrap_err();
        assert!(matches!(error, Error::NoDevice { .. }), "{error}");
    }
}

#[test]
fn a_driver_is_one_of_vfio_by_its_whole_name() {
    let fake = Fake::new(false);
    let mut device = fake.pci().device(fake.bdf).unwrap();
    for (driver, is_vfio) in [
        ("vfio-pci", true),
        ("mlx5_vfio_pci", true),
        ("barlease-vfio-pci", true),
        ("novfio", false),
        ("vfio-pci-lookalike", false),
    ] {
        device.driver = Some(driver.to_owned());
        assert_eq!(device.is_vfio(), is_vfio, "{driver}");
    }
}

#[test]
fn a_host_driver_is_not_unbound() {
    let fake = Fake::new(false);
    assert!(matches!(
        fake.pci().unbind(fake.bdf),
        Err(Error::Invalid { .. })
    ));
    assert_eq!(fake.bound_to().as_deref(), Some("nvme"));
}

#[test]
fn opening_says_what_is_wrong() {
    let fake = Fake::new(false);
    let open = |bdf: &str| {
        OpenOptions::new()
            .sysfs(fake.root.path())
            .dev(fake.path("dev"))
            .open(bdf.parse().unwrap())
            .unwrap_err()
    };
    assert!(matches!(open("00:06.0"), Error::NoDevice { .. }));

    let error = open("00:05.0");
    assert_eq!(
        error.report().to_string(),
        "open: 0000:00:05.0: bound to nvme, which is not a vfio driver \
         (run `barlease device bind 0000:00:05.0`)"
    );

    fake.pci().bind(fake.bdf, "vfio-pci").unwrap();
    let error = open("00:05.0").report().to_string();
    assert!(error.contains("dev/vfio/vfio"), "{error}");

    fs::remove_file(fake.device().join("iommu_group")).unwrap();
    assert!(matches!(open("00:05.0"), Error::NoIommuGroup { .. }));
}

#[test]
fn a_group_without_an_iommu_is_opened_on_demand_only() {
    let fake = Fake::new(false);
    fake.pci().bind(fake.bdf, "vfio-pci").unwrap();
    fs::create_dir_all(fake.path("dev/vfio")).unwrap();
    fs::write(fake.path("dev/vfio/noiommu-4"), "").unwrap();
    let options = OpenOptions::new()
        .sysfs(fake.root.path())
        .dev(fake.path("dev"));
    assert!(matches!(
        options.open(fake.bdf),
        Err(Error::NoIommuGroup { .. })
    ));
    #[allow(unsafe_code, reason = "there is no device")]
    // SAFETY: there is no device, and so no DMA.
    let options = unsafe { options.noiommu() };
    // It gets as far as the container, which is not there.
    let error = options.open(fake.bdf).unwrap_err().report().to_string();
    assert!(error.contains("dev/vfio/vfio"), "{error}");
}

#[test]
fn reset_methods_are_those_of_sysfs() {
    let fake = Fake::new(false);
    let file = fake.device().join("reset_method");
    assert!(fake.pci().reset_methods(fake.bdf).unwrap().is_empty());
    fs::write(&file, "flr bus\n").unwrap();
    assert_eq!(fake.pci().reset_methods(fake.bdf).unwrap(), ["flr", "bus"]);
    fake.pci().set_reset_methods(fake.bdf, &["bus"]).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "bus\n");
    fake.pci().set_default_reset_methods(fake.bdf).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "default\n");
    let other = "00:06.0".parse().unwrap();
    assert!(matches!(
        fake.pci().reset_methods(other),
        Err(Error::NoDevice { .. })
    ));
    assert!(matches!(
        fake.pci().reset(fake.bdf),
        Err(Error::Unsupported { .. })
    ));
}

#[test]
fn barlease_is_known_by_its_parameter_in_the_place_of_stock_vfio_pci() {
    let fake = Fake::new(false);
    let module = fake.path("module/vfio_pci");
    fs::create_dir_all(module.join("parameters")).unwrap();
    symlink(&module, fake.driver("vfio-pci").join("module")).unwrap();
    fake.pci().bind(fake.bdf, "vfio-pci").unwrap();
    assert!(!fake.pci().device(fake.bdf).unwrap().is_barlease());
    assert_eq!(fake.pci().module(), None);

    fs::write(module.join("parameters/msix_export"), "auto\n").unwrap();
    fs::write(module.join("version"), "0.1.0\n").unwrap();
    assert!(fake.pci().device(fake.bdf).unwrap().is_barlease());
    let module = fake.pci().module().expect("a module");
    assert_eq!(module.version.as_deref(), Some("0.1.0"));
}

#[test]
fn a_slot_has_the_functions_of_its_card() {
    let fake = Fake::new(false);
    let slot = fake.path("bus/pci/slots/3");
    fs::create_dir_all(&slot).unwrap();
    fs::write(slot.join("address"), "0000:00:05\n").unwrap();
    let found = fake.pci().slot("3");
    assert_eq!(
        found.iter().map(|one| one.bdf).collect::<Vec<_>>(),
        [fake.bdf]
    );
    fs::write(slot.join("address"), "0000:00:06\n").unwrap();
    for empty in ["3", "4", "", "..", "../slots/3"] {
        assert_eq!(fake.pci().slot(empty), [], "{empty}");
    }
}
