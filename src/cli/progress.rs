//! Follows a job of the daemon: a bar with rate and ETA on a terminal, JSON lines elsewhere.
//!
//! The job belongs to the daemon. Ctrl-C, or a daemon that restarts in between, does not end it.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, Request, encode};
use super::error::CliError;
use super::kek::Style;

const POLL: Duration = Duration::from_millis(500);
/// For how long a restarting daemon is waited for.
const AWAY: Duration = Duration::from_secs(30);

/// Polls until the job has ended and returns its last state.
pub(crate) async fn follow(client: &Client, mut job: Value, style: Style) -> Result<Value, CliError> {
    let id = job["id"].as_str().ok_or_else(|| client.strange("a job without id"))?.to_owned();
    let path = format!("/v1/jobs/{}", encode(&id));
    let show = Show::new(style, &job);
    let mut answered = Instant::now();
    loop {
        show.update(&job);
        if matches!(job["state"].as_str(), Some("succeeded" | "failed" | "cancelled")) {
            show.end();
            return Ok(job);
        }
        let next = async {
            client.interruptible(tokio::time::sleep(POLL)).await?;
            client.json(Request::new(Method::GET, &path)).await
        };
        match next.await {
            Ok(now) => {
                answered = Instant::now();
                job = now;
            }
            Err(error) if may_pass(&error) && answered.elapsed() < AWAY => {}
            Err(error) => {
                show.end();
                return Err(detached(error, &id));
            }
        }
    }
}

fn may_pass(error: &CliError) -> bool {
    match error {
        CliError::Unreachable { .. } => true,
        CliError::Refused(problem) => matches!(problem.status, 429 | 503),
        _ => false,
    }
}

fn detached(error: CliError, id: &str) -> CliError {
    match error {
        CliError::Interrupted { .. } => CliError::Interrupted {
            hint: Some(format!(
                "the job goes on in the daemon: `lacre kek wait {id}` shows it, `lacre kek cancel {id}` stops it"
            )),
        },
        other => other,
    }
}

/// A job's progress on standard error.
pub(crate) enum Show {
    /// For people.
    Bar(ProgressBar),
    /// For programs.
    Lines(Instant),
    /// Not at all.
    Nothing,
}

impl Show {
    /// Begins.
    pub(crate) fn new(style: Style, job: &Value) -> Self {
        match style {
            Style::None => Self::Nothing,
            Style::Auto if std::io::stderr().is_terminal() => Self::Bar(bar(job)),
            Style::Auto | Style::Json => Self::Lines(Instant::now()),
        }
    }

    /// Shows the numbers of now.
    pub(crate) fn update(&self, job: &Value) {
        let count = |member: &str| job[member].as_u64().unwrap_or(0);
        match self {
            Self::Bar(bar) => {
                bar.set_length(count("total"));
                bar.set_position(count("done"));
                bar.set_message(format!("{} failed", count("failed")));
            }
            Self::Lines(start) => eprintln!("{}", progress_line(job, start.elapsed())),
            Self::Nothing => {}
        }
    }

    /// Leaves the last state standing.
    pub(crate) fn end(&self) {
        if let Self::Bar(bar) = self {
            bar.finish();
        }
    }
}

fn bar(job: &Value) -> ProgressBar {
    let bar = ProgressBar::new(job["total"].as_u64().unwrap_or(0));
    let template = "records [{bar:30}] {pos}/{len}  {per_sec}  ETA {eta}  {msg}";
    // The template is a constant; were it wrong, the default bar would do.
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// One progress line: the job's numbers, the rate since we look, and the seconds left at that rate.
fn progress_line(job: &Value, elapsed: Duration) -> Value {
    let count = |member: &str| job[member].as_u64().unwrap_or(0);
    let (done, total) = (count("done"), count("total"));
    let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
    let rate = done.saturating_mul(1000) / millis;
    let left = total.saturating_sub(done).saturating_sub(count("failed"));
    json!({
        "job": job["id"],
        "state": job["state"],
        "done": done,
        "total": total,
        "failed": count("failed"),
        "per_second": rate,
        "eta_seconds": left.checked_div(rate),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_progress_line_tells_rate_and_time_left() {
        let job = json!({ "id": "j", "state": "running", "done": 100, "total": 400, "failed": 0 });

        let line = progress_line(&job, Duration::from_secs(2));

        assert_eq!(line["per_second"], 50);
        assert_eq!(line["eta_seconds"], 6);
    }

    #[test]
    fn a_job_that_has_not_moved_has_no_time_left() {
        let job = json!({ "id": "j", "state": "queued", "done": 0, "total": 400, "failed": 0 });

        assert!(progress_line(&job, Duration::ZERO)["eta_seconds"].is_null());
    }
}
