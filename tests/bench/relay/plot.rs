//! The plots: rate and CPU time against the number of clients, the size of the mails and the number
//! of workers.
//!
//! Contract: a plot is one SVG file per name in the `curves` of the scenarios. Each relay has a
//! line through the medians; the vertical bars reach from the smallest to the largest slot.
//!
//! # Failure
//! A file that can't be written is an error. A curve with fewer than two points isn't drawn.

use std::{collections::BTreeMap, fs, io, path::Path};

use plotters::{
    backend::SVGBackend,
    chart::{ChartBuilder, SeriesLabelPosition},
    coord::{
        Shift,
        ranged1d::{AsRangedCoord, Ranged, ValueFormatter},
    },
    drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea as _},
    element::{Circle, PathElement},
    prelude::IntoLogRange as _,
    series::LineSeries,
    style::{BLACK, Color as _, RGBColor, WHITE},
};
use serde_json::Value;

use crate::error::{BenchError, system};

/// Width and height of a plot, in pixels.
const SIZE: (u32, u32) = (960, 400);

/// Colours of the relays, in the order of their names.
const COLOURS: [RGBColor; 4] =
    [RGBColor(0, 114, 178), RGBColor(204, 121, 167), RGBColor(213, 94, 0), RGBColor(0, 158, 115)];

/// The curves, and what their axes say.
const AXES: [(&str, &str); 3] =
    [("clients", "clients"), ("size", "bytes per message"), ("workers", "workers")];

/// The two halves of a plot: the number's name in the records, and its title.
const PANELS: [(&str, &str); 2] =
    [("mails_per_s", "mails per second"), ("cpu_us", "CPU time per mail, µs")];

/// A point of a line: place on the axis, and median, smallest and largest value.
type Point = (f64, [f64; 3]);

/// The lines of a panel, by the names of the relays.
type Lines = BTreeMap<String, Vec<Point>>;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws every curve that the records have points of.
pub fn draw(directory: &Path, records: &[Value]) -> Result<(), BenchError> {
    fs::create_dir_all(directory).map_err(system(directory.display().to_string()))?;
    for (name, axis) in AXES {
        let panels = PANELS.map(|(number, title)| (title, lines(records, name, number)));
        if panels.iter().all(|(_, lines)| lines.values().any(|points| points.len() > 1)) {
            let file = directory.join(format!("{name}.svg"));
            draw_file(&file, axis, &panels).map_err(|error| {
                system(file.display().to_string())(io::Error::other(error.to_string()))
            })?;
            println!("{}", file.display());
        }
    }
    Ok(())
}

/// Collects the lines of one number on one curve. Second copies of relays are left out.
fn lines(records: &[Value], curve: &str, number: &str) -> Lines {
    let mut lines = Lines::new();
    for record in records {
        let mut curves = record["curves"].as_array().into_iter().flatten();
        let Some(place) =
            curves.find(|entry| entry[0] == curve).and_then(|entry| entry[1].as_f64())
        else {
            continue;
        };
        for (relay, numbers) in record["relays"].as_object().into_iter().flatten() {
            let value = |of: &str| numbers[number][of].as_f64().unwrap_or_default();
            if !relay.ends_with(" again") {
                let line = lines.entry(relay.clone()).or_default();
                line.push((place, [value("median"), value("min"), value("max")]));
            }
        }
    }
    lines.values_mut().for_each(|points| points.sort_by(|(a, _), (b, _)| a.total_cmp(b)));
    lines
}

type DrawError<'a> =
    DrawingAreaErrorKind<<SVGBackend<'a> as plotters::backend::DrawingBackend>::ErrorType>;

fn draw_file<'a>(
    file: &'a Path,
    axis: &str,
    panels: &[(&str, Lines)],
) -> Result<(), DrawError<'a>> {
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let halves = area.split_evenly((1, panels.len()));
    for (half, (title, lines)) in halves.iter().zip(panels) {
        let values = || lines.values().flatten().flat_map(|(_, numbers)| *numbers);
        let (least, most) = values().fold((f64::INFINITY, 0.0), |(a, b), x| (x.min(a), x.max(b)));
        // Large mails cost a thousand times as much as small ones. The names of the relays have
        // room above the lines.
        match least * 100.0 < most {
            true => draw_panel(half, axis, title, lines, (least / 2.0..most * 20.0).log_scale())?,
            false => draw_panel(half, axis, title, lines, 0.0..most * 1.4)?,
        }
    }
    area.present()
}

fn draw_panel<'a, Values>(
    area: &Area<'a>,
    axis: &str,
    title: &str,
    lines: &Lines,
    values: Values,
) -> Result<(), DrawError<'a>>
where
    Values: AsRangedCoord<Value = f64>,
    Values::CoordDescType: ValueFormatter<f64> + Ranged<ValueType = f64>,
{
    let places = lines.values().flatten().map(|(place, _)| *place);
    let (first, last) = places.fold((f64::INFINITY, 0.0), |(a, b), x| (x.min(a), x.max(b)));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d((first..last * 1.01).log_scale(), values)?;
    let whole = |value: &f64| format!("{value:.0}");
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(axis).max_light_lines(0).x_label_formatter(&whole).y_label_formatter(&whole);
    mesh.draw()?;
    for ((name, points), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let medians = points.iter().map(|(place, [median, ..])| (*place, *median));
        let line = LineSeries::new(medians.clone(), colour.stroke_width(2));
        chart
            .draw_series(line)?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        chart.draw_series(medians.map(|point| Circle::new(point, 3, colour.filled())))?;
        let bars = points.iter().map(|(place, [_, least, most])| {
            PathElement::new([(*place, *least), (*place, *most)], colour.stroke_width(1))
        });
        chart.draw_series(bars)?;
    }
    let mut labels = chart.configure_series_labels();
    labels.position(SeriesLabelPosition::UpperRight);
    labels.background_style(WHITE.mix(0.8)).border_style(BLACK).draw()
}
