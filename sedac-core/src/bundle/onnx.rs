//! The parts of an ONNX file that loading checks, as protobuf messages.
//!
//! Field numbers are those of <https://github.com/onnx/onnx/blob/main/onnx/onnx.proto>; fields that
//! are left out here are skipped. Every place that may hold a tensor is named, so that no external
//! file escapes [`OnnxModel::external_tensors`].

use prost::Message;

/// A whole file.
#[derive(Clone, PartialEq, Message)]
pub struct OnnxModel {
    /// What it computes.
    #[prost(message, optional, tag = "7")]
    pub graph: Option<Graph>,
    #[prost(message, repeated, tag = "20")]
    training_info: Vec<TrainingInfo>,
    #[prost(message, repeated, tag = "25")]
    functions: Vec<Function>,
}

/// Nodes and the tensors between them.
#[derive(Clone, PartialEq, Message)]
pub struct Graph {
    #[prost(message, repeated, tag = "1")]
    node: Vec<Node>,
    /// Its name: which engine it is.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Stored tensors.
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<Tensor>,
    #[prost(message, repeated, tag = "15")]
    sparse_initializer: Vec<SparseTensor>,
    /// What it takes.
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfo>,
    /// What it gives.
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfo>,
}

#[derive(Clone, PartialEq, Message)]
struct Node {
    #[prost(message, repeated, tag = "5")]
    attribute: Vec<Attribute>,
}

#[derive(Clone, PartialEq, Message)]
struct Attribute {
    #[prost(message, optional, tag = "5")]
    t: Option<Tensor>,
    #[prost(message, optional, tag = "6")]
    g: Option<Graph>,
    #[prost(message, repeated, tag = "10")]
    tensors: Vec<Tensor>,
    #[prost(message, repeated, tag = "11")]
    graphs: Vec<Graph>,
    #[prost(message, optional, tag = "22")]
    sparse_tensor: Option<SparseTensor>,
    #[prost(message, repeated, tag = "23")]
    sparse_tensors: Vec<SparseTensor>,
}

#[derive(Clone, PartialEq, Message)]
struct Function {
    #[prost(message, repeated, tag = "7")]
    node: Vec<Node>,
    #[prost(message, repeated, tag = "11")]
    attribute_proto: Vec<Attribute>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainingInfo {
    #[prost(message, optional, tag = "1")]
    initialization: Option<Graph>,
    #[prost(message, optional, tag = "2")]
    algorithm: Option<Graph>,
}

/// A stored tensor.
#[derive(Clone, PartialEq, Message)]
pub struct Tensor {
    /// Its shape.
    #[prost(int64, repeated, tag = "1")]
    pub dims: Vec<i64>,
    /// Its element type, a number of TensorProto.DataType.
    #[prost(int32, tag = "2")]
    pub data_type: i32,
    /// Its name.
    #[prost(string, tag = "8")]
    pub name: String,
    /// Where its bytes are, by key: `location`, `offset` and `length`.
    #[prost(message, repeated, tag = "13")]
    pub external_data: Vec<StringEntry>,
    /// 1 when its bytes are in another file.
    #[prost(int32, tag = "14")]
    pub data_location: i32,
}

#[derive(Clone, PartialEq, Message)]
struct SparseTensor {
    #[prost(message, optional, tag = "1")]
    values: Option<Tensor>,
    #[prost(message, optional, tag = "2")]
    indices: Option<Tensor>,
}

/// A key and its value.
#[derive(Clone, PartialEq, Message)]
pub struct StringEntry {
    /// The key.
    #[prost(string, tag = "1")]
    pub key: String,
    /// The value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// An input or output.
#[derive(Clone, PartialEq, Message)]
pub struct ValueInfo {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its type.
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<Type>,
}

/// The type of a value.
#[derive(Clone, PartialEq, Message)]
pub struct Type {
    /// Set where the value is a tensor.
    #[prost(message, optional, tag = "1")]
    pub tensor_type: Option<TensorType>,
}

/// Element type and shape of a tensor.
#[derive(Clone, PartialEq, Message)]
pub struct TensorType {
    /// A number of TensorProto.DataType.
    #[prost(int32, tag = "1")]
    pub elem_type: i32,
    /// Its shape.
    #[prost(message, optional, tag = "2")]
    pub shape: Option<Shape>,
}

/// A shape.
#[derive(Clone, PartialEq, Message)]
pub struct Shape {
    /// Its axes.
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<Dimension>,
}

/// An axis; without a value it is open.
#[derive(Clone, PartialEq, Message)]
pub struct Dimension {
    /// Its size.
    #[prost(int64, optional, tag = "1")]
    pub dim_value: Option<i64>,
    /// Its name.
    #[prost(string, optional, tag = "2")]
    pub dim_param: Option<String>,
}

impl OnnxModel {
    /// Every tensor whose bytes are in another file, wherever it is in the model.
    pub fn external_tensors(&self) -> Vec<&Tensor> {
        let mut found = Vec::new();
        let training = self.training_info.iter();
        let training = training.flat_map(|info| [&info.initialization, &info.algorithm]);
        for graph in training.chain([&self.graph]).flatten() {
            graph.collect(&mut found);
        }
        for function in &self.functions {
            let attributes = function.attribute_proto.iter();
            attributes.for_each(|attribute| attribute.collect(&mut found));
            function
                .node
                .iter()
                .for_each(|node| node.collect(&mut found));
        }
        found
    }
}

impl Graph {
    fn collect<'a>(&'a self, found: &mut Vec<&'a Tensor>) {
        let sparse = self.sparse_initializer.iter();
        sparse.for_each(|tensor| tensor.collect(found));
        found.extend(
            self.initializer
                .iter()
                .filter(|tensor| tensor.is_external()),
        );
        self.node.iter().for_each(|node| node.collect(found));
    }
}

impl Node {
    fn collect<'a>(&'a self, found: &mut Vec<&'a Tensor>) {
        let attributes = self.attribute.iter();
        attributes.for_each(|attribute| attribute.collect(found));
    }
}

impl Attribute {
    fn collect<'a>(&'a self, found: &mut Vec<&'a Tensor>) {
        let tensors = self.t.iter().chain(&self.tensors);
        found.extend(tensors.filter(|tensor| tensor.is_external()));
        let sparse = self.sparse_tensor.iter().chain(&self.sparse_tensors);
        sparse.for_each(|tensor| tensor.collect(found));
        let graphs = self.g.iter().chain(&self.graphs);
        graphs.for_each(|graph| graph.collect(found));
    }
}

impl SparseTensor {
    fn collect<'a>(&'a self, found: &mut Vec<&'a Tensor>) {
        let parts = self.values.iter().chain(&self.indices);
        found.extend(parts.filter(|tensor| tensor.is_external()));
    }
}

impl Tensor {
    /// Whether its bytes are in another file. What names a file counts, whatever the location says.
    pub fn is_external(&self) -> bool {
        self.data_location != 0 || !self.external_data.is_empty()
    }

    /// The value of `key` in its description of external data; None when it is given twice, since
    /// readers differ in which they take.
    pub fn external(&self, key: &str) -> Option<&str> {
        let mut entries = self.external_data.iter();
        let mut entries = entries.by_ref().filter(|entry| entry.key == key);
        let value = &entries.next()?.value;
        entries.next().is_none().then_some(value)
    }

    /// Its number of elements; None when a size is negative or they are too many to count.
    pub fn elements(&self) -> Option<u64> {
        let sizes = self.dims.iter().map(|&size| u64::try_from(size).ok());
        sizes
            .into_iter()
            .try_fold(1, |product: u64, size| product.checked_mul(size?))
    }

    /// Bits of an element; None for types that engines do not store.
    pub fn element_bits(&self) -> Option<u64> {
        match self.data_type {
            1 | 6 | 12 => Some(32),
            2 | 3 | 9 => Some(8),
            4 | 5 | 10 | 16 => Some(16),
            7 | 11 | 13 => Some(64),
            21 | 22 => Some(4),
            _ => None,
        }
    }
}

impl ValueInfo {
    /// Its element type and axes, None for open ones; None when it is no tensor with a shape.
    pub fn tensor(&self) -> Option<(i32, Vec<Option<u64>>)> {
        let tensor = self.r#type.as_ref()?.tensor_type.as_ref()?;
        let axes = tensor.shape.iter().flat_map(|shape| &shape.dim);
        let sizes = axes.map(|axis| axis.dim_value.and_then(|size| u64::try_from(size).ok()));
        Some((tensor.elem_type, sizes.collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_external_tensor_is_overlooked() {
        let tensor = |name: &str| Tensor {
            name: name.into(),
            data_location: 1,
            ..Tensor::default()
        };
        let sparse = |name: &str| SparseTensor {
            values: Some(tensor(name)),
            indices: Some(tensor("indices")),
        };
        let graph = |name: &str| Graph {
            initializer: vec![tensor(name)],
            sparse_initializer: vec![sparse("sparse")],
            ..Graph::default()
        };
        let attribute = Attribute {
            t: Some(tensor("t")),
            g: Some(graph("g")),
            tensors: vec![tensor("tensors")],
            graphs: vec![graph("graphs")],
            sparse_tensor: Some(sparse("sparse_tensor")),
            sparse_tensors: vec![sparse("sparse_tensors")],
        };
        let node = Node {
            attribute: vec![attribute.clone()],
        };
        let whole = Graph {
            node: vec![node.clone()],
            ..graph("own")
        };
        let model = OnnxModel {
            graph: Some(whole.clone()),
            training_info: vec![TrainingInfo {
                initialization: Some(whole.clone()),
                algorithm: Some(whole),
            }],
            functions: vec![Function {
                node: vec![node],
                attribute_proto: vec![attribute],
            }],
        };
        let read = OnnxModel::decode(&*model.encode_to_vec()).unwrap();
        assert_eq!(read, model);
        // an attribute holds 12 tensors, a graph 3 beside its attributes
        assert_eq!(read.external_tensors().len(), 3 * (12 + 3) + 2 * 12);
    }
}
