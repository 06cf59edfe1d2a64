//! What of a graph's values comes of its stored tensors alone.

use std::collections::HashMap;

use prost::Message;

use super::edited_graph::{EditedGraph, ONNX, Operator, Stored};

pub(super) const FLOAT: i32 = 1;
pub(super) const UINT8: i32 = 2;
pub(super) const FLOAT16: i32 = 10;
pub(super) const BFLOAT16: i32 = 16;

/// The stored tensors of a graph by name, and the nodes that change how they lie.
pub(super) struct StoredValues {
    stored: HashMap<String, Stored>,
    nodes: HashMap<String, Operator>,
}

/// Stored tensors of one type that are the parts of a matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Matrix {
    pub(super) parts: Vec<String>,
    pub(super) data_type: i32,
    /// It is the transpose of what is stored.
    pub(super) is_transposed: bool,
    /// [rows, columns] of the parts, as they are stored.
    shapes: Vec<[i64; 2]>,
}

impl StoredValues {
    pub(super) fn of(graph: &EditedGraph) -> Self {
        let is_given = |tensor: &Stored| graph.input.iter().any(|input| input.name == tensor.name);
        let stored = graph.initializer.iter();
        let stored = stored.filter_map(|tensor| Stored::decode(&**tensor).ok());
        let stored = stored.filter(|tensor| !is_given(tensor));
        let nodes = graph.node.iter().filter(|node| {
            let mut known = ["Cast", "Concat", "Transpose"].into_iter();
            let is_known = known.any(|op_type| node.is(ONNX, op_type));
            is_known && node.output.len() == 1 && !node.input.is_empty()
        });
        Self {
            stored: stored.map(|tensor| (tensor.name.clone(), tensor)).collect(),
            nodes: nodes
                .map(|node| (node.output[0].clone(), node.clone()))
                .collect(),
        }
    }

    /// The stored tensors, of `data_type`, that `name` is one of, or that it joins.
    pub(super) fn parts(&self, name: &str, data_type: i32) -> Option<Vec<String>> {
        let parts = match self.nodes.get(name) {
            Some(join) if is_join(join) => join.input.clone(),
            _ => vec![name.to_owned()],
        };
        let is_known =
            |part: &String| Some(data_type) == self.stored.get(part).map(|s| s.data_type);
        parts.iter().all(is_known).then_some(parts)
    }

    /// The matrix `name`, fp32, if it comes of stored ones of one type.
    pub(super) fn matrix(&self, name: &str) -> Option<Matrix> {
        let (name, is_transposed) = match self.nodes.get(name) {
            Some(node) if node.op_type == "Transpose" && node.transposes() => {
                (&*node.input[0], true)
            }
            _ => (name, false),
        };
        let parts = match self.nodes.get(name) {
            Some(join) if is_join(join) => &join.input[..],
            _ => &[name.to_owned()],
        };
        let stored = parts.iter().map(|part| self.uncast(part));
        let stored = stored.collect::<Option<Vec<_>>>()?;
        let data_type = stored.first()?.data_type;
        let shapes = stored
            .iter()
            .map(|tensor| <[i64; 2]>::try_from(&*tensor.dims).ok());
        let shapes = shapes.collect::<Option<Vec<_>>>()?;
        let is_one = stored.iter().all(|tensor| tensor.data_type == data_type);
        is_one.then(|| Matrix {
            parts: stored.iter().map(|tensor| tensor.name.clone()).collect(),
            data_type,
            is_transposed,
            shapes,
        })
    }

    /// How many numbers the vector `name` has, if it is a stored one.
    pub(super) fn size(&self, name: &str) -> Option<i64> {
        let &[size] = &*self.uncast(name)?.dims else {
            return None;
        };
        Some(size)
    }

    /// The stored tensor that `name` is in fp32.
    fn uncast(&self, name: &str) -> Option<&Stored> {
        match self.nodes.get(name) {
            Some(node) if node.op_type == "Cast" && node.integer("to") == Some(FLOAT as usize) => {
                self.stored.get(&node.input[0])
            }
            _ => self
                .stored
                .get(name)
                .filter(|tensor| tensor.data_type == FLOAT),
        }
    }
}

impl Matrix {
    /// How many columns it has; None where it joins parts that do not lie side by side.
    pub(super) fn columns(&self) -> Option<i64> {
        let rows = self.shapes.first()?[1];
        match (self.is_transposed, &self.shapes[..]) {
            (true, shapes) => {
                let fits = shapes.iter().all(|shape| shape[1] == rows);
                fits.then(|| shapes.iter().map(|shape| shape[0]).sum())
            }
            (false, [shape]) => Some(shape[1]),
            (false, _) => None,
        }
    }
}

fn is_join(node: &Operator) -> bool {
    node.op_type == "Concat" && node.integer("axis") == Some(0)
}
