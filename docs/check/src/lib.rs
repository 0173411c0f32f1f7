//! The examples of README and docs compile. They are not the library's own tests, since its
//! published package does not have these files.

#[cfg(doctest)]
mod examples {
    #[doc = include_str!("../../../README.md")]
    struct Readme;

    #[doc = include_str!("../../tutorial.md")]
    struct Tutorial;

    #[doc = include_str!("../../driver.md")]
    struct Driver;

    #[doc = include_str!("../../vmm.md")]
    struct Vmm;
}
