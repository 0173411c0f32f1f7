//! Remedies, and all that is known of an error on one line.

use std::borrow::Cow;
use std::fmt;

use super::Error;
use super::Object;

impl Error {
    /// The remedy, where known.
    #[must_use]
    pub fn remedy(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::NoDevice { .. } => Some("`barlease device` lists them".into()),
            Self::NotBound { bdf, .. } => Some(format!("run `barlease device bind {bdf}`").into()),
            Self::NoIommuGroup { .. } => Some(
                "turn the IOMMU on: in the firmware, and for Intel's with intel_iommu=on".into(),
            ),
            Self::GroupNotViable { others, .. } => {
                let list: Vec<String> = others.iter().map(|o| o.bdf.to_string()).collect();
                let list = list.join(" ");
                Some(
                    format!(
                        "bind every device of the group to a vfio driver: \
                         `barlease device bind {list}`"
                    )
                    .into(),
                )
            }
            Self::Denied { remedy, .. } => remedy.as_deref().map(Cow::Borrowed),
            Self::Busy { remedy, object, .. } => Some(match (remedy, object) {
                (Some(remedy), _) => Cow::Borrowed(remedy.as_ref()),
                (None, Object::File(path)) if !path.starts_with("/dev/vfio") => format!(
                    "`fuser -v {}` names the process that has it",
                    path.display()
                )
                .into(),
                (None, object) => {
                    let which = match object {
                        Object::Device(bdf) => format!(" {bdf}"),
                        _ => String::new(),
                    };
                    format!(
                        "one process at a time can have it open: `barlease lease holders{which}` \
                         names the one; a mapping of a BAR that is left counts, of this process, too"
                    )
                    .into()
                }
            }),
            Self::Unsupported { remedy, .. } => Some(Cow::Borrowed(remedy)),
            Self::Revoked { .. } => Some("try again when the lease is back".into()),
            Self::Dead { .. } => Some("ask the owner for a new lease".into()),
            Self::WrongDevice { .. } => Some("use the device that exported the lease".into()),
            _ => None,
        }
    }

    /// The operation, the object, the whole chain of causes and the remedy, on one line.
    pub fn report(&self) -> impl fmt::Display + '_ {
        Report(self)
    }
}

struct Report<'a>(&'a Error);

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = std::error::Error::source(self.0);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        match self.0.remedy() {
            Some(remedy) => write!(f, " ({remedy})"),
            None => Ok(()),
        }
    }
}
