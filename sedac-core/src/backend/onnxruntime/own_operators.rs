//! Graphs as the CPU backend runs them.

use prost::Message;

use super::edited_graph::Model;
#[cfg(target_arch = "x86_64")]
use super::half_matmul::replace_half_products;
#[cfg(target_arch = "x86_64")]
use super::quantized_matmul::replace_quantized_products;
use super::row_attention::replace_attention;

/// The ONNX file `graph` with the chain's own operators, as the CPU backend runs layers: attention takes rows
/// of any sequences. None where it is as it is.
pub fn with_own_operators(graph: &[u8]) -> Option<Vec<u8>> {
    // both, not one of them
    edited(graph, |model| {
        replace_attention(model) | replace_products(model)
    })
}

/// As [`with_own_operators`], but attention stays as it is: engines other than layers bind its inputs.
pub(super) fn with_own_products(graph: &[u8]) -> Option<Vec<u8>> {
    edited(graph, replace_products)
}

#[cfg(target_arch = "x86_64")]
fn replace_products(model: &mut Model) -> bool {
    replace_quantized_products(model) | replace_half_products(model)
}

/// Kernels are written for x86-64.
#[cfg(not(target_arch = "x86_64"))]
fn replace_products(_: &mut Model) -> bool {
    false
}

fn edited(graph: &[u8], edit: impl FnOnce(&mut Model) -> bool) -> Option<Vec<u8>> {
    let mut model = Model::of_file(graph)?;
    if !edit(&mut model) {
        return None;
    }
    model.import_own_operators();
    Some(model.encode_to_vec())
}

#[cfg(test)]
mod tests {
    use super::super::edited_graph::EditedGraph;
    use super::super::edited_graph::examples::{lines, operator};
    use super::*;

    fn file(op_type: &str) -> Vec<u8> {
        let graph = EditedGraph {
            node: vec![operator(op_type, "query", "y")],
            ..EditedGraph::default()
        };
        let model = Model {
            graph: Some(graph),
            ..Model::default()
        };
        model.encode_to_vec()
    }

    #[test]
    fn graphs_say_that_they_have_own_operators() {
        let model = with_own_operators(&file("GroupQueryAttention")).unwrap();
        let model = Model::decode(&*model).unwrap();
        assert_eq!(
            lines(&model),
            ["RowAttention query     position_ids slots: y"]
        );
        let [domain] = &model.opset_import[..] else {
            panic!("an operator set more");
        };
        assert!(domain.windows(5).any(|part| part == b"sedac"));
        assert_eq!(with_own_operators(&file("Attention")), None);
        assert_eq!(with_own_operators(b"no protobuf"), None);
    }

    #[test]
    fn attention_of_other_engines_stays() {
        assert_eq!(with_own_products(&file("GroupQueryAttention")), None);
    }

    #[test]
    fn fields_of_another_type_are_left_out() {
        let graph = file("GroupQueryAttention");
        let fixed = [&b"\x08\x00\x09\x00ORTM\x00\x00\x00"[..], &graph].concat();
        assert_eq!(with_own_operators(&fixed), with_own_operators(&graph));
        assert!(with_own_operators(&graph).is_some());
    }
}
