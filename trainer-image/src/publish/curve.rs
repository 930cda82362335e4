//! `loss_curve.svg`: training loss as a line, eval loss as points, over optimizer steps.

use std::fmt::Write;

use crate::history::History;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 48.0;
const TRAIN: &str = "#2563eb";
const EVAL: &str = "#dc2626";

/// Where data lies on the picture.
struct Axes {
    max_step: f64,
    max_loss: f64,
}

impl Axes {
    fn x(&self, step: f64) -> f64 {
        LEFT + step / self.max_step * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, loss: f64) -> f64 {
        HEIGHT - BOTTOM - loss / self.max_loss * (HEIGHT - TOP - BOTTOM)
    }

    fn polyline(&self, points: &[(f64, f64)]) -> String {
        let points: Vec<String> =
            points.iter().map(|&(step, loss)| format!("{:.1},{:.1}", self.x(step), self.y(loss))).collect();
        points.join(" ")
    }
}

pub(super) fn render(history: &History) -> String {
    let train: Vec<_> = history.logs.iter().map(|log| (log.step as f64, log.loss)).collect();
    let eval: Vec<_> = history.evals.iter().map(|eval| (eval.step as f64, eval.loss)).collect();
    let highest = train.iter().chain(&eval).map(|&(_, loss)| loss).fold(0.0, f64::max);
    let (mut steps, losses) = (ticks(history.step.max(1) as f64), ticks(highest.max(1e-3)));
    steps.retain(|step| step.fract() == 0.0);
    let last = |ticks: &[f64]| ticks.last().copied().unwrap_or(1.0);
    let axes = Axes { max_step: history.step.max(1) as f64, max_loss: last(&losses).max(highest) };

    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="#374151">
<title>Loss over steps</title>
<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>
"##
    );
    let (x0, x1, y0) = (LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM);
    // Writing to a String can't fail.
    for &loss in &losses {
        let y = axes.y(loss);
        let _ = writeln!(svg, r##"<line x1="{x0}" y1="{y:.1}" x2="{x1}" y2="{y:.1}" stroke="#e5e7eb"/>"##);
        let _ = writeln!(svg, r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{loss}</text>"#, x0 - 8.0, y + 4.0);
    }
    for &step in &steps {
        let x = axes.x(step);
        let _ = writeln!(svg, r#"<text x="{x:.1}" y="{:.1}" text-anchor="middle">{step}</text>"#, y0 + 18.0);
    }
    let middle = (x0 + x1) / 2.0;
    let _ = writeln!(svg, r#"<text x="{middle}" y="{:.1}" text-anchor="middle">optimizer steps</text>"#, HEIGHT - 10.0);
    let _ = writeln!(svg, r#"<text x="{x0}" y="24">loss (nats a token)</text>"#);
    for (x, color, label) in [(WIDTH - 190.0, TRAIN, "training"), (WIDTH - 100.0, EVAL, "evaluation")] {
        let _ = writeln!(svg, r#"<rect x="{x}" y="15" width="10" height="10" fill="{color}"/>"#);
        let _ = writeln!(svg, r#"<text x="{}" y="24">{label}</text>"#, x + 15.0);
    }
    for (points, color) in [(&train, TRAIN), (&eval, EVAL)] {
        let line = axes.polyline(points);
        let _ = writeln!(svg, r#"<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>"#);
    }
    for &(step, loss) in &eval {
        let (x, y) = (axes.x(step), axes.y(loss));
        let _ = writeln!(svg, r#"<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="{EVAL}"/>"#);
        let anchor = if x > middle { "end" } else { "start" };
        let _ = writeln!(
            svg,
            r#"<text x="{x:.1}" y="{:.1}" text-anchor="{anchor}" fill="{EVAL}">{loss:.3}</text>"#,
            y - 8.0
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// Round numbers from 0 to `max` or a little below: multiples of 1, 2 or 5 times a power of ten.
fn ticks(max: f64) -> Vec<f64> {
    let raw = max / 6.0;
    let power = 10f64.powf(raw.log10().floor());
    let spacing = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|&s| s >= raw).unwrap_or(raw);
    // Rounded, as 3 · 0.1 is 0.30000000000000004.
    (0..=(max / spacing) as u32).map(|i| (f64::from(i) * spacing * 1e6).round() / 1e6).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::history::{EvalPoint, TrainPoint};

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(ticks(40.0), [0.0, 10.0, 20.0, 30.0, 40.0]);
        assert_eq!(ticks(3.3), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(ticks(0.31), [0.0, 0.1, 0.2, 0.3]);
    }

    #[test]
    fn every_measured_loss_is_inside_the_picture() {
        let train = |step, loss| TrainPoint { step, loss, ..TrainPoint::default() };
        let history = History {
            step: 20,
            logs: vec![train(10, 3.0), train(20, 9.9)],
            evals: vec![EvalPoint { loss: 3.343, ..EvalPoint::default() }],
            ..History::default()
        };
        let svg = render(&history);
        let line = svg.lines().find(|line| line.starts_with("<polyline")).unwrap();
        let points = line.split('"').nth(1).unwrap().split(' ').flat_map(|point| point.split_once(','));
        for (x, y) in points {
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!((LEFT..=WIDTH - RIGHT).contains(&x) && (TOP..=HEIGHT - BOTTOM).contains(&y), "{line}");
        }
        assert!(svg.contains(">3.343<"));
    }
}
