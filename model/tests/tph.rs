// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Steering tags: every combination of what a device completes and of what may be asked.

use barlease_model::tph::{Completer, Request, Tph, TphError};

const COMPLETERS: [Completer; 3] = [Completer::None, Completer::Tph, Completer::Extended];

#[test]
fn the_completer_is_bits_13_and_12() {
    let expected = [
        Completer::None,
        Completer::Tph,
        Completer::None,
        Completer::Extended,
    ];
    for (bits, completer) in (0u32..).zip(expected) {
        for others in [0, 0xffff_cfff, 0x0000_0fff] {
            let register = bits << 12 | others;
            assert_eq!(Completer::from_device_capabilities2(register), completer);
        }
    }
}

#[test]
fn each_request_is_answered_as_the_contract_says() {
    let undefined = !(barlease_abi::TPH_ST | barlease_abi::TPH_ST_EXT);
    for completer in COMPLETERS {
        for flags in (0..8).chain([1 << 31, undefined]) {
            for tag in [0, 1, 0xff] {
                for extended_tag in [0, 1, 0x100, 0xffff] {
                    for hint in 0..=255 {
                        let request = Request {
                            flags,
                            tag,
                            extended_tag,
                            hint,
                        };
                        check(request, completer, undefined);
                    }
                }
            }
        }
    }
}

fn check(request: Request, completer: Completer, undefined: u32) {
    let st = request.flags & barlease_abi::TPH_ST != 0;
    let ext = request.flags & barlease_abi::TPH_ST_EXT != 0;
    let answer = Tph::new(request, completer);
    let context = format!("{completer:?} {request:?}");
    if completer == Completer::None || (ext && completer == Completer::Tph) {
        assert_eq!(answer, Err(TphError::Unsupported), "{context}");
    } else if request.flags & undefined != 0
        || request.hint > 3
        || (!st && request.tag != 0)
        || (!ext && request.extended_tag != 0)
    {
        assert_eq!(answer, Err(TphError::Invalid), "{context}");
    } else {
        let tph = answer.expect(&context);
        let expected = st.then_some((u16::from(request.tag), request.hint));
        assert_eq!(tph.get(false), expected, "{context}");
        let expected = ext.then_some((request.extended_tag, request.hint));
        assert_eq!(tph.get(true), expected, "{context}");
    }
}

#[test]
fn without_tags_there_is_nothing_to_send() {
    assert_eq!(Tph::NONE, Tph::default());
    assert_eq!(Tph::NONE.get(false), None);
    assert_eq!(Tph::NONE.get(true), None);
}
