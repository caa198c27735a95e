//! Requests with up to 100 items: answered with 200 and one result per item, in order; an item that fails has
//! its own error and spoils no other.

use actix_web::HttpResponse;
use serde_json::{Value, json};

use crate::http::problem::{Code, Problem};

const MAX_ITEMS: usize = 100;

pub(super) fn counted<T>(items: Vec<T>) -> Result<Vec<T>, Problem> {
    match items.len() {
        1..=MAX_ITEMS => Ok(items),
        _ => Err(Problem::invalid("items", "must be 1 to 100")),
    }
}

/// Parts what can be asked of the service from what is wrong already; `None` marks the former's places.
pub(super) fn sorted<T>(parsed: impl Iterator<Item = Result<T, Problem>>) -> (Vec<T>, Vec<Option<Problem>>) {
    let mut items = Vec::new();
    let places = parsed.map(|one| match one {
        Ok(item) => {
            items.push(item);
            None
        }
        Err(problem) => Some(problem),
    });
    let places = places.collect();
    (items, places)
}

/// Puts the service's results into the places that [`sorted`] left free.
pub(super) fn merged<T, E: Into<Problem>>(
    places: Vec<Option<Problem>>,
    results: Vec<Result<T, E>>,
) -> Result<Vec<Result<T, Problem>>, Problem> {
    let mut results = results.into_iter();
    let place = |place: Option<Problem>| match place {
        Some(problem) => Ok(Err(problem)),
        None => results.next().map(|one| one.map_err(Into::into)).ok_or_else(|| Problem::new(Code::Internal)),
    };
    places.into_iter().map(place).collect()
}

/// The body of one item that failed.
pub(super) fn failed(problem: &Problem) -> Value {
    if let Some(cause) = problem.cause_chain() {
        tracing::error!(code = problem.code().name(), cause, "an item of a batch failed");
    }
    json!({ "error": problem.item() })
}

/// The answer to one item, or to a batch.
pub(super) fn answer<T>(
    results: Vec<Result<T, Problem>>,
    is_batch: bool,
    view: impl Fn(&T) -> Value,
) -> Result<HttpResponse, Problem> {
    if is_batch {
        let items = results.iter().map(|one| one.as_ref().map_or_else(failed, &view));
        return Ok(HttpResponse::Ok().json(json!({ "items": items.collect::<Vec<_>>() })));
    }
    let one = results.into_iter().next().ok_or_else(|| Problem::new(Code::Internal))??;
    Ok(HttpResponse::Ok().json(view(&one)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_stand_where_their_items_stood() {
        let parsed = [Ok(1), Err(Problem::new(Code::Invalid)), Ok(3)];
        let (items, places) = sorted(parsed.into_iter());
        assert_eq!(items, [1, 3]);

        let results: Vec<Result<u8, Problem>> = vec![Ok(10), Err(Problem::new(Code::Integrity))];
        let codes: Vec<_> =
            merged(places, results).unwrap().into_iter().map(|one| one.map_err(|p| p.code())).collect();
        assert_eq!(codes, [Ok(10), Err(Code::Invalid), Err(Code::Integrity)]);
    }

    #[test]
    fn a_missing_result_is_not_passed_over() {
        let results: Vec<Result<u8, Problem>> = vec![];
        assert!(merged(vec![None], results).is_err());
        assert!(answer(Vec::<Result<u8, Problem>>::new(), false, |_| Value::Null).is_err());
    }
}
