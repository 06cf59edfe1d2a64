//! Attention of rows, each of any sequence and position, over the caches of their sequences.
//!
//! In the place of ONNX Runtime's GroupQueryAttention, which computes a row alone by another kernel than
//! beside others, so that it has other bits, and refuses several rows of several sequences. It also takes
//! longer: a row of nine heads of 64 numbers over 150 and 500 positions 34 and 60 us with two threads of an
//! Intel machine with AVX-512, where [`kernel`] takes 6 and 19 with one.

mod graph;
mod kernel;
mod rotary;

use std::cell::RefCell;
use std::ffi::CStr;
use std::sync::Mutex;

use fearless_simd::Level;

pub(super) use self::graph::replace_attention;
use self::kernel::{QUERIES, Query, Scores, attend};
use self::rotary::Rotary;
use super::operator::{CustomOperator, Input, NodeInfo, Result, Run, Tensor};

/// What graphs call where rows belong: the slot among the caches, and the position.
pub(super) const SLOTS: &str = "slots";
pub(super) const POSITIONS: &str = "position_ids";

/// Scores of one thread's work below which waking others takes longer.
const SCORES_ALONE: usize = 3000;

thread_local! {
    static WEIGHTS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// [rows, heads, head size]: rotated queries of what the thread runs.
    static ROTATED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The operator with a node's attributes, which are those of GroupQueryAttention. It takes
/// - query, key and value, fp32 [1, rows, heads * head size] each, or all in the first;
/// - the caches of keys and values, fp32 [slots, key-value heads, positions, head size];
/// - `position_ids`, int64 [1, rows], and `slots`, int64 [rows];
/// - tables of cosines and sines, fp32 [positions, rotated numbers / 2], where it rotates,
///
/// and gives what rows attend to, fp32 [1, rows, heads * head size], and the caches, in the same memory.
pub(super) struct RowAttention {
    level: Level,
    heads: usize,
    key_heads: usize,
    /// 1 / sqrt(head size) where there is none.
    scale: Option<f32>,
    softcap: f32,
    /// How many positions a row sees, its own included; None for all.
    window: Option<usize>,
    rotates: bool,
    is_interleaved: bool,
}

/// Where the rows of a pass belong, and the shape of the caches.
struct Places<'a> {
    positions: &'a [i64],
    slots: &'a [i64],
    /// [slots, key-value heads, positions, head size]
    shape: [usize; 4],
}

impl Places<'_> {
    fn count(&self) -> usize {
        self.positions.len()
    }

    /// Where in a cache the numbers of `head` at the row's position begin, and the position.
    fn place(&self, row: usize, head: usize) -> (usize, usize) {
        let [_, heads, positions, size] = self.shape;
        let (slot, position) = (self.slots[row] as usize, self.positions[row] as usize);
        ((slot * heads + head) * positions * size, position)
    }

    /// Fails where a row belongs to no slot or position of the caches.
    fn check(&self) -> Result<()> {
        let below = |numbers: &[i64], end: usize| {
            let mut numbers = numbers.iter();
            numbers.all(|&number| usize::try_from(number).is_ok_and(|number| number < end))
        };
        let [slots, _, positions, _] = self.shape;
        match self.positions.len() == self.slots.len()
            && below(self.slots, slots)
            && below(self.positions, positions)
        {
            true => Ok(()),
            false => Err("a row outside of the caches"),
        }
    }
}

/// Query, key and value of a row.
struct RowNumbers<'a> {
    query: &'a [f32],
    key: &'a [f32],
    value: &'a [f32],
}

/// The rows that attention is given.
enum Given<'a> {
    Together(&'a [f32]),
    Apart([&'a [f32]; 3]),
}

impl<'a> Given<'a> {
    /// The row `row` of `count`, whose keys and values have `key_width` numbers.
    fn row(&self, row: usize, count: usize, key_width: usize) -> RowNumbers<'a> {
        let of =
            |numbers: &'a [f32]| &numbers[numbers.len() / count * row..][..numbers.len() / count];
        match self {
            Self::Together(all) => {
                let all = of(all);
                let (rest, value) = all.split_at(all.len() - key_width);
                let (query, key) = rest.split_at(rest.len() - key_width);
                RowNumbers { query, key, value }
            }
            Self::Apart([query, key, value]) => RowNumbers {
                query: of(query),
                key: of(key),
                value: of(value),
            },
        }
    }
}

impl CustomOperator for RowAttention {
    const NAME: &'static CStr = c"RowAttention";
    const INPUTS: &'static [Input] = &[
        Input::FLOATS,
        Input::FLOATS.optional(),
        Input::FLOATS.optional(),
        Input::FLOATS,
        Input::FLOATS,
        Input::INTEGERS,
        Input::INTEGERS,
        Input::FLOATS.optional(),
        Input::FLOATS.optional(),
    ];
    const OUTPUTS: usize = 3;

    fn new(node: &NodeInfo) -> Result<Self> {
        Ok(Self {
            level: Level::new(),
            heads: node.integer(c"num_heads"),
            key_heads: node.integer(c"kv_num_heads"),
            scale: Some(node.number(c"scale")).filter(|&scale| scale != 0.0),
            softcap: node.number(c"softcap"),
            window: Some(node.integer(c"local_window_size")).filter(|&window| window > 0),
            rotates: node.integer(c"do_rotary") == 1,
            is_interleaved: node.integer(c"rotary_interleaved") == 1,
        })
    }

    fn compute(&self, run: &Run) -> Result<()> {
        let cache = |index| -> Result<_> {
            let cache = Tensor::<f32>::input(run, index)?;
            cache.ok_or("caches are missing")
        };
        let caches = [cache(3)?, cache(4)?];
        let numbers = |index| -> Result<_> {
            match Tensor::<f32>::input(run, index)? {
                Some(input) if caches.iter().any(|cache| cache.overlaps(&input)) => {
                    Err("an input in the memory of the caches")
                }
                // SAFETY: outputs are the caches and memory of their own.
                input => Ok(input.map(|input| (input.shape, unsafe { input.numbers() }))),
            }
        };
        let indices = |index| -> Result<_> {
            let input = Tensor::<i64>::input(run, index)?;
            let input = input.ok_or("an input is missing")?;
            // SAFETY: as above; caches are of another type.
            Ok(unsafe { input.numbers() })
        };
        let places = Places {
            positions: indices(5)?,
            slots: indices(6)?,
            shape: sizes(caches[0].shape)?,
        };
        places.check()?;
        if caches[0].shape != caches[1].shape {
            return Err("caches of different shapes");
        }
        let given = match (numbers(0)?, numbers(1)?, numbers(2)?) {
            (Some((_, all)), None, None) => Given::Together(all),
            (Some((_, query)), Some((_, key)), Some((_, value))) => {
                Given::Apart([query, key, value])
            }
            _ => return Err("query, key or value is missing"),
        };
        self.check(&given, &places)?;
        let [_, _, _, size] = places.shape;
        let rotary = match (self.rotates, numbers(7)?, numbers(8)?) {
            (false, _, _) => None,
            (true, Some((shape, cosines)), Some((_, sines))) => {
                let half = shape.last().map_or(0, |&half| half as usize);
                let rotary = Rotary::new([cosines, sines], half, self.is_interleaved, size);
                Some(rotary.ok_or("tables of rotations of another size")?)
            }
            _ => return Err("the tables of rotations are missing"),
        };
        let [mut keys, mut values] = [
            same_memory(run, 1, &caches[0])?,
            same_memory(run, 2, &caches[1])?,
        ];
        // SAFETY: they are different outputs. Whoever runs the kernel has given the caches to it alone, and
        // of the inputs that are the same memory only shapes and addresses are read.
        let (keys, values) = unsafe { (keys.numbers_mut(), values.numbers_mut()) };
        ROTATED.with_borrow_mut(|queries| {
            let caches = [&mut *keys, &mut *values];
            self.place(&given, &places, rotary.as_ref(), (queries, caches))?;
            let shape = [1, places.count() as i64, (self.heads * size) as i64];
            let mut attended = Tensor::<f32>::output(run, 0, &shape)?;
            // SAFETY: memory of its own.
            let attended = unsafe { attended.numbers_mut() };
            self.attend(run, (&places, queries), [keys, values], attended)
        })
    }
}

impl RowAttention {
    /// Fails where the numbers given are not those of as many rows.
    fn check(&self, given: &Given<'_>, places: &Places<'_>) -> Result<()> {
        let [_, key_heads, _, size] = places.shape;
        let rows = places.count();
        let (query, key) = (rows * self.heads * size, rows * key_heads * size);
        let fits = match given {
            Given::Together(all) => all.len() == query + 2 * key,
            Given::Apart(parts) => parts.map(<[f32]>::len) == [query, key, key],
        };
        let grouped =
            key_heads == self.key_heads && key_heads > 0 && self.heads.is_multiple_of(key_heads);
        match fits && grouped && size > 0 && rows > 0 {
            true => Ok(()),
            false => Err("rows of another width"),
        }
    }

    /// Write the keys and values of all rows to the caches, and their queries to `queries`.
    fn place(
        &self,
        given: &Given<'_>,
        places: &Places<'_>,
        rotary: Option<&Rotary<'_>>,
        (queries, [keys, values]): (&mut Vec<f32>, [&mut [f32]; 2]),
    ) -> Result<()> {
        let [_, key_heads, _, size] = places.shape;
        queries.clear();
        let count = places.count() * self.heads * size;
        queries
            .try_reserve(count)
            .map_err(|_| "no memory for rows")?;
        for row in 0..places.count() {
            let numbers = given.row(row, places.count(), key_heads * size);
            let first = queries.len();
            queries.extend_from_slice(numbers.query);
            let (_, position) = places.place(row, 0);
            let rotation = rotary.map(|rotary| {
                let rotation = rotary.at(position);
                rotation.ok_or("a position without a rotation")
            });
            let rotation = rotation.transpose()?;
            if let Some(rotation) = &rotation {
                let queries = queries[first..].chunks_exact_mut(size);
                queries.for_each(|query| rotation.apply(self.level, query));
            }
            for head in 0..key_heads {
                let (start, position) = places.place(row, head);
                let place = start + position * size..start + (position + 1) * size;
                let source = head * size..(head + 1) * size;
                let key = &mut keys[place.clone()];
                key.copy_from_slice(&numbers.key[source.clone()]);
                if let Some(rotation) = &rotation {
                    rotation.apply(self.level, key);
                }
                values[place].copy_from_slice(&numbers.value[source]);
            }
        }
        Ok(())
    }

    /// Compute what rows attend to among keys and values that are all there.
    fn attend(
        &self,
        run: &Run,
        (places, queries): (&Places<'_>, &[f32]),
        [keys, values]: [&[f32]; 2],
        attended: &mut [f32],
    ) -> Result<()> {
        let [_, heads, positions, size] = places.shape;
        let cache = positions * size;
        let scores = Scores {
            scale: self.scale.unwrap_or_else(|| (size as f32).sqrt().recip()),
            softcap: self.softcap,
        };
        let tiles = self.tiles((places, queries), attended);
        let count = tiles.len();
        // no thread waits for one: each has another tile
        let tiles: Vec<_> = tiles.into_iter().map(Mutex::new).collect();
        let attend_tile = |index: usize| {
            if let Ok(mut tile) = tiles[index].lock() {
                let Tile {
                    slot,
                    key_head,
                    queries,
                } = &mut *tile;
                let start = (*slot * heads + *key_head) * cache;
                let caches = [keys, values].map(|cached| &cached[start..start + cache]);
                WEIGHTS.with_borrow_mut(|weights| {
                    attend(self.level, queries, caches, scores, weights);
                });
            }
        };
        let seen = places
            .positions
            .iter()
            .map(|&position| position as usize + 1);
        if seen.sum::<usize>() * self.heads < SCORES_ALONE {
            (0..count).for_each(attend_tile);
            return Ok(());
        }
        run.in_parallel(count, &attend_tile)
    }

    /// The queries of all rows, a few of one sequence and one head of its caches together.
    fn tiles<'a>(
        &self,
        (places, queries): (&Places<'_>, &'a [f32]),
        attended: &'a mut [f32],
    ) -> Vec<Tile<'a>> {
        let [_, key_heads, _, size] = places.shape;
        let group = self.heads / key_heads;
        let mut tiles: Vec<Tile<'a>> = Vec::with_capacity(places.count() * self.heads);
        // the last tile of each head
        let mut last = vec![None; key_heads];
        let queries = queries
            .chunks_exact(size)
            .zip(attended.chunks_exact_mut(size));
        for (index, (numbers, attended)) in queries.enumerate() {
            let (row, key_head) = (index / self.heads, index % self.heads / group);
            let slot = places.slots[row] as usize;
            let end = places.positions[row] as usize + 1;
            let query = Query {
                numbers,
                seen: self.window.map_or(0, |window| end.saturating_sub(window))..end,
                attended,
            };
            match last[key_head].map(|last: usize| &mut tiles[last]) {
                Some(tile) if tile.slot == slot && tile.queries.len() < QUERIES => {
                    tile.queries.push(query);
                }
                _ => {
                    last[key_head] = Some(tiles.len());
                    let mut queries = Vec::with_capacity(QUERIES);
                    queries.push(query);
                    tiles.push(Tile {
                        slot,
                        key_head,
                        queries,
                    });
                }
            }
        }
        tiles
    }
}

/// Queries that see the same cache.
struct Tile<'a> {
    slot: usize,
    key_head: usize,
    queries: Vec<Query<'a>>,
}

/// The output `index` of `run`: the caches given as `cache`, to be written in place.
fn same_memory<'a>(run: &'a Run, index: usize, cache: &Tensor<'_, f32>) -> Result<Tensor<'a, f32>> {
    let output = Tensor::output(run, index, cache.shape)?;
    match output.address() == cache.address() {
        true => Ok(output),
        false => Err("caches are read and written in other memory"),
    }
}

fn sizes(shape: &[i64]) -> Result<[usize; 4]> {
    let shape = <[i64; 4]>::try_from(shape).map_err(|_| "caches of another rank")?;
    Ok(shape.map(|size| usize::try_from(size).unwrap_or(0)))
}
