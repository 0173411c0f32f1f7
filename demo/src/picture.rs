//! The pictures that the processes draw: frames of pixels in ordinary memory, copied to the lease
//! row by row.

use std::convert::Infallible;

use embedded_graphics::mono_font::{MonoTextStyle, ascii::FONT_10X20};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::*;
use embedded_graphics::primitives::{Circle, PrimitiveStyle, Rectangle};
use embedded_graphics::text::Text;

use crate::adapter::{PITCH, WIDTH};

/// A frame of 32-bit pixels, `WIDTH` wide.
#[derive(Debug)]
pub(crate) struct Frame {
    pixels: Vec<u8>,
    height: usize,
}

impl Frame {
    /// Black.
    pub(crate) fn new(height: usize) -> Self {
        Self {
            pixels: vec![0; height * PITCH],
            height,
        }
    }

    /// The bytes of a row.
    pub(crate) fn row(&self, y: usize) -> &[u8] {
        self.pixels.get(y * PITCH..(y + 1) * PITCH).unwrap_or(&[])
    }

    /// Rows.
    pub(crate) fn height(&self) -> usize {
        self.height
    }

    fn put(&mut self, x: usize, y: usize, color: Rgb888) {
        let place = y * PITCH + x * 4;
        if let Some(pixel) = self.pixels.get_mut(place..place + 4) {
            pixel.copy_from_slice(&[color.b(), color.g(), color.r(), 0]);
        }
    }

    /// Writes a line of text on a dark ground.
    pub(crate) fn caption(&mut self, x: i32, y: i32, text: &str, color: Rgb888) {
        let style = MonoTextStyle::new(&FONT_10X20, color);
        let ground = Rectangle::new(
            Point::new(x - 8, y - 20),
            Size::new(text.len() as u32 * 10 + 16, 30),
        );
        let Ok(()) = ground
            .into_styled(PrimitiveStyle::with_fill(Rgb888::new(16, 16, 24)))
            .draw(self);
        let Ok(_) = Text::new(text, Point::new(x, y), style).draw(self);
    }
}

impl OriginDimensions for Frame {
    fn size(&self) -> Size {
        Size::new(WIDTH as u32, self.height as u32)
    }
}

impl DrawTarget for Frame {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I>(&mut self, pixels: I) -> Result<(), Infallible>
    where
        I: IntoIterator<Item = Pixel<Rgb888>>,
    {
        for Pixel(point, color) in pixels {
            if let (Ok(x), Ok(y)) = (usize::try_from(point.x), usize::try_from(point.y)) {
                if x < WIDTH && y < self.height {
                    self.put(x, y, color);
                }
            }
        }
        Ok(())
    }
}

/// A picture that moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Picture {
    /// A sun that sets over water.
    Sunset,
    /// Slanted bands of color.
    Bands,
    /// Rings around the middle.
    Rings,
}

impl Picture {
    /// By its name on the command line.
    pub(crate) fn named(name: &str) -> Option<Self> {
        [Self::Sunset, Self::Bands, Self::Rings]
            .into_iter()
            .find(|picture| picture.name() == name)
    }

    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sunset => "sunset",
            Self::Bands => "bands",
            Self::Rings => "rings",
        }
    }

    /// Draws frame number `time`.
    pub(crate) fn draw(self, frame: &mut Frame, time: usize) {
        match self {
            Self::Sunset => sunset(frame, time),
            Self::Bands => per_pixel(frame, |x, y| bands(x, y, time)),
            Self::Rings => {
                let middle = frame.height() / 2;
                per_pixel(frame, |x, y| rings(x, y, middle, time));
            }
        }
    }
}

fn per_pixel(frame: &mut Frame, color: impl Fn(usize, usize) -> Rgb888) {
    for y in 0..frame.height() {
        for x in 0..WIDTH {
            frame.put(x, y, color(x, y));
        }
    }
}

fn sunset(frame: &mut Frame, time: usize) {
    let height = frame.height();
    let horizon = height * 2 / 3;
    for y in 0..height {
        let color = if y < horizon {
            let part = y * 255 / horizon;
            Rgb888::new((60 + part * 3 / 4) as u8, (30 + part / 3) as u8, 110)
        } else {
            let wave = (y * y / 7 + time) % 40;
            Rgb888::new((40 + wave) as u8, (50 + wave) as u8, (110 + wave) as u8)
        };
        for x in 0..WIDTH {
            frame.put(x, y, color);
        }
    }
    let sink = (time % (horizon / 2)) as i32;
    let sun = Circle::with_center(Point::new(700, horizon as i32 / 2 + sink), 150);
    let Ok(()) = sun
        .into_styled(PrimitiveStyle::with_fill(Rgb888::new(255, 214, 120)))
        .draw(frame);
}

fn bands(x: usize, y: usize, time: usize) -> Rgb888 {
    let place = (x + 2 * y + time * 2) / 24 % 6;
    match place {
        0 => Rgb888::new(30, 144, 160),
        1 => Rgb888::new(38, 166, 154),
        2 => Rgb888::new(102, 187, 106),
        3 => Rgb888::new(156, 204, 101),
        4 => Rgb888::new(102, 187, 106),
        _ => Rgb888::new(38, 166, 154),
    }
}

fn rings(x: usize, y: usize, middle: usize, time: usize) -> Rgb888 {
    let (dx, dy) = (x.abs_diff(WIDTH / 2), y.abs_diff(middle));
    let ring = (dx * dx + dy * dy + 100 * time) / 1500 % 8;
    let light = (ring * 26) as u8;
    Rgb888::new(70 + light / 2, 30 + light / 3, 90 + light / 2)
}
