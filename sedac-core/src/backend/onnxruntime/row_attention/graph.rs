//! Layer graphs whose attention is the chain's own.

use std::collections::{HashMap, HashSet};

use super::{POSITIONS, RowAttention, SLOTS};
use crate::backend::onnxruntime::edited_graph::{Model, Operator};
use crate::bundle::onnx::{Dimension, Shape, TensorType, Type, ValueInfo};

/// What GroupQueryAttention takes, by position: rows, and how many there are in each sequence.
const ROWS: [usize; 3] = [0, 1, 2];
const LENGTHS: [usize; 2] = [5, 6];
const TABLES: [usize; 2] = [7, 8];
const LENGTH_INPUTS: [&str; 2] = ["seqlens_k", "total_sequence_length"];

const INT64: i32 = 7;

/// Have rows of any sequences attend by the chain's own operator in the layer graph `model`. False where its
/// attention is no GroupQueryAttention, or takes more than is known here.
pub(in super::super) fn replace_attention(model: &mut Model) -> bool {
    let Some(graph) = model.graph.as_mut() else {
        return false;
    };
    let is_known = |node: &Operator| node.input.iter().skip(9).all(String::is_empty);
    let mut attentions = graph
        .node
        .iter()
        .filter(|node| node.is_attention())
        .peekable();
    let has_attention = attentions.peek().is_some();
    if !(has_attention && attentions.all(is_known) && graph.node.iter().all(is_whole)) {
        return false;
    }
    remove_spare_rows(&mut graph.node);
    graph
        .node
        .iter_mut()
        .filter(|node| node.is_attention())
        .for_each(replace);
    graph
        .input
        .retain(|input| !LENGTH_INPUTS.contains(&&*input.name));
    graph.input.push(indices(POSITIONS, &[Some(1), None]));
    graph.input.push(indices(SLOTS, &[None]));
    let caches = graph.input.iter_mut().chain(&mut graph.output);
    caches.for_each(open_slots);
    true
}

/// Whether `node` gives something, and of something where it may extend or cut rows.
fn is_whole(node: &Operator) -> bool {
    let extends = matches!(&*node.op_type, "Pad" | "Add");
    !(node.output.is_empty() || extends && node.input.is_empty())
}

/// Make `node` the operator of this module.
fn replace(node: &mut Operator) {
    let given = |index: usize| node.input.get(index).cloned().unwrap_or_default();
    let mut input: Vec<_> = (0..5).map(given).collect();
    input.extend([POSITIONS.into(), SLOTS.into()]);
    input.extend(TABLES.map(given));
    while input.last().is_some_and(String::is_empty) {
        input.pop();
    }
    node.input = input;
    node.make::<RowAttention>();
}

/// Give attention the rows themselves where the graph has it compute one more, as quantized graphs of
/// earlier builds do.
fn remove_spare_rows(nodes: &mut Vec<Operator>) {
    let attentions = || nodes.iter().filter(|node| node.is_attention());
    let given = |inputs: &[usize]| -> HashSet<String> {
        let of = |node: &Operator| {
            let inputs = inputs.iter().filter_map(|&n| node.input.get(n));
            inputs.cloned().collect::<Vec<_>>()
        };
        attentions().flat_map(of).collect()
    };
    let (rows, lengths) = (given(&ROWS), given(&LENGTHS));
    let attended: HashSet<_> = attentions().map(|node| node.output[0].clone()).collect();
    let (extensions, mut others): (Vec<_>, Vec<_>) =
        std::mem::take(nodes).into_iter().partition(|node| {
            let given = |names: &HashSet<String>| names.contains(&node.output[0]);
            match &*node.op_type {
                "Pad" => given(&rows) || attended.contains(&node.input[0]),
                "Add" => given(&lengths),
                _ => false,
            }
        });
    let names: HashMap<_, _> = extensions.iter().map(renamed(&attended)).collect();
    for node in &mut others {
        for value in node.input.iter_mut().chain(&mut node.output) {
            if let Some(&name) = names.get(value) {
                name.clone_into(value);
            }
        }
    }
    *nodes = others;
}

/// What a value has to be called instead without the node that extends it, or cuts it.
fn renamed<'a>(attended: &HashSet<String>) -> impl Fn(&'a Operator) -> (&'a String, &'a String) {
    |node| {
        let (before, after) = (&node.input[0], &node.output[0]);
        match attended.contains(before) {
            true => (before, after),
            false => (after, before),
        }
    }
}

/// Leave the number of slots open in `value`, where it has one.
fn open_slots(value: &mut ValueInfo) {
    let prefixes = ["past_", "present_"];
    if !prefixes.iter().any(|prefix| value.name.starts_with(prefix)) {
        return;
    }
    if let Some(Type {
        tensor_type: Some(TensorType {
            shape: Some(shape), ..
        }),
    }) = &mut value.r#type
        && let Some(first) = shape.dim.first_mut()
    {
        first.dim_value = None;
        first.dim_param = Some(SLOTS.into());
    }
}

/// An input of integers, of which None is as many as there are rows.
fn indices(name: &str, sizes: &[Option<i64>]) -> ValueInfo {
    let dim = sizes.iter().map(|&size| Dimension {
        dim_value: size,
        dim_param: size.is_none().then(|| "rows".into()),
    });
    let shape = Some(Shape { dim: dim.collect() });
    ValueInfo {
        name: name.into(),
        r#type: Some(Type {
            tensor_type: Some(TensorType {
                elem_type: INT64,
                shape,
            }),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::onnxruntime::edited_graph::EditedGraph;
    use crate::backend::onnxruntime::edited_graph::examples::{lines, operator};

    fn value(name: &str, sizes: &[i64]) -> ValueInfo {
        let sizes: Vec<_> = sizes.iter().map(|&size| Some(size)).collect();
        indices(name, &sizes)
    }

    fn model(node: Vec<Operator>) -> Model {
        let input = ["x", "seqlens_k", "total_sequence_length"].map(|name| value(name, &[1]));
        let graph = EditedGraph {
            node,
            input: input
                .into_iter()
                .chain([value("past_key_0", &[1, 2, 9, 4])])
                .collect(),
            output: vec![value("y", &[1]), value("present_key_0", &[1, 2, 9, 4])],
            ..EditedGraph::default()
        };
        Model {
            graph: Some(graph),
            ..Model::default()
        }
    }

    fn replaced(mut model: Model) -> Option<Model> {
        replace_attention(&mut model).then_some(model)
    }

    fn sizes(value: &ValueInfo) -> Vec<Option<i64>> {
        let shape = value
            .r#type
            .as_ref()
            .and_then(|t| t.tensor_type.as_ref()?.shape.as_ref());
        shape
            .unwrap()
            .dim
            .iter()
            .map(|dimension| dimension.dim_value)
            .collect()
    }

    #[test]
    fn rows_say_where_they_belong() {
        let attention = "query key value past_key_0 past_value_0 seqlens_k total_sequence_length";
        let graph = model(vec![
            operator("MatMul", "x w", "query"),
            operator(
                "GroupQueryAttention",
                attention,
                "y present_key_0 present_value_0",
            ),
        ]);
        let model = replaced(graph).unwrap();
        assert_eq!(
            lines(&model),
            [
                "MatMul x w: query",
                "RowAttention query key value past_key_0 past_value_0 position_ids slots: \
                 y present_key_0 present_value_0",
            ]
        );
        let graph = model.graph.unwrap();
        let names: Vec<_> = graph.input.iter().map(|input| &*input.name).collect();
        assert_eq!(names, ["x", "past_key_0", "position_ids", "slots"]);
        for cache in [&graph.input[1], &graph.output[1]] {
            assert_eq!(sizes(cache), [None, Some(2), Some(9), Some(4)]);
        }
        assert_eq!(sizes(&graph.output[0]), [Some(1)]);
    }

    #[test]
    fn quantized_graphs_lose_their_spare_row() {
        let attention = "padded - - past_key_0 past_value_0 length total cosines sines";
        let graph = model(vec![
            operator("Pad", "packed pads", "padded"),
            operator("Add", "seqlens_k one", "length"),
            operator("Add", "total_sequence_length one", "total"),
            operator(
                "GroupQueryAttention",
                attention,
                "spare present_key_0 present_value_0",
            ),
            operator("Pad", "spare cut", "attended"),
            operator("Pad", "attended others", "stays"),
            operator("Add", "stays x", "y"),
        ]);
        assert_eq!(
            lines(&replaced(graph).unwrap()),
            [
                "RowAttention packed   past_key_0 past_value_0 position_ids slots cosines sines: \
                 attended present_key_0 present_value_0",
                "Pad attended others: stays",
                "Add stays x: y",
            ]
        );
    }

    #[test]
    fn other_attention_stays_as_it_is() {
        let more = "query key value past_key_0 past_value_0 seqlens_k total - - - bias";
        for node in [
            operator("Attention", "query key value", "y"),
            operator(
                "GroupQueryAttention",
                more,
                "y present_key_0 present_value_0",
            ),
        ] {
            assert_eq!(replaced(model(vec![node])), None);
        }
        let attention = "query key value past_key_0 past_value_0 seqlens_k total";
        let mut broken = operator("GroupQueryAttention", attention, "y");
        broken.output.clear();
        assert_eq!(replaced(model(vec![broken])), None);
        let mut broken = operator("Pad", "x", "y");
        broken.input.clear();
        let attention = operator("GroupQueryAttention", attention, "z");
        assert_eq!(replaced(model(vec![broken, attention])), None);
    }
}
