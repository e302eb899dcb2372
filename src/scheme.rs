//! The scheme: the whole recipe of a cache as one value, and the presets. A published system is a preset of it.

use serde::{Deserialize, Serialize};

use crate::codebook::Codebook;
use crate::codec::{ScaleDtype, ScaleKind};
use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// Version of the JSON form.
pub const SCHEME_VERSION: u32 = 1;

/// Which way a block runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Axis {
    /// Along the channels of one token.
    Channel,
    /// Along the tokens of one channel.
    Token,
}

/// What a block along the channels may cover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Span {
    /// Channels of one head.
    #[default]
    Head,
    /// Channels of all heads of a token, concatenated.
    Heads,
}

/// A codebook by name (see [`Codebook::parse`]) or by its levels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BookSpec {
    /// `"nf4"`, `"lloyd3"`, ...
    Name(String),
    /// Ascending levels.
    Levels(Vec<f32>),
}

impl BookSpec {
    /// Builds the codebook with fp32 levels.
    pub fn build(&self) -> Result<Codebook> {
        match self {
            Self::Name(name) => Codebook::parse(name),
            Self::Levels(levels) => Codebook::custom(levels),
        }
    }
}

/// The recipe of one side, keys or values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SideSpec {
    /// Levels that a code stands for.
    pub codebook: BookSpec,
    /// Which way a block runs.
    pub axis: Axis,
    /// Elements of a block: 16, 32 or 64 along tokens; 16..=512 along channels.
    pub block: usize,
    /// Whether a block along the channels stays inside one head.
    #[serde(default)]
    pub span: Span,
    /// What a block stores.
    pub scale: ScaleKind,
    /// How it is stored.
    pub scale_dtype: ScaleDtype,
    /// Bits of each slab of 16 stored channels, widest first; the codebook's own width everywhere if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub widths: Option<Vec<u8>>,
    /// For each head, the channel that stands at each stored place (keys only); identity if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel_order: Option<Vec<Vec<u16>>>,
}

/// Keys, values, exact tokens: everything that decides a cache's bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheme {
    /// Version of this form.
    #[serde(default = "scheme_version")]
    pub version: u32,
    /// A name for people.
    pub name: String,
    /// Keys.
    pub key: SideSpec,
    /// Values.
    pub value: SideSpec,
    /// Newest tokens that are always exact.
    pub residual_length: usize,
    /// First tokens that are always exact.
    pub sink_tokens: usize,
    /// Element type of exact tokens; the input's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact_dtype: Option<Dtype>,
    /// Layers that keep an ordinary cache; negative numbers count from the last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skip_layers: Vec<i64>,
}

fn scheme_version() -> u32 {
    SCHEME_VERSION
}

impl SideSpec {
    fn check(&self, what: &str) -> Result<()> {
        let book = self.codebook.build()?.to_fp16()?;
        match self.axis {
            Axis::Token => {
                if what == "value" {
                    let why = "values need one scale per token: use axis \"channel\"";
                    return Err(Error::unsupported("value axis \"token\"", why));
                }
                if ![16, 32, 64].contains(&self.block) {
                    return Err(Error::value(format!("{what}.block"), "16, 32 or 64 along tokens", self.block));
                }
                if self.span == Span::Heads {
                    return Err(Error::unsupported(format!("{what}.span \"heads\" along tokens"), "a channel has one head"));
                }
            }
            Axis::Channel if !(16..=512).contains(&self.block) => {
                return Err(Error::value(format!("{what}.block"), "16 to 512 along channels", self.block));
            }
            Axis::Channel => {}
        }
        if let Some(widths) = &self.widths {
            for &w in widths.iter().filter(|&&w| w != 0) {
                book.with_bits(w)?;
            }
            if what == "value" && widths.iter().any(|w| Some(w) != widths.first()) {
                return Err(Error::unsupported("values of several widths", "V has one width"));
            }
        } else if book.bits() == 7 {
            return Err(Error::value(format!("{what}.codebook width"), "1 to 6, or 8 bits in a page", 7));
        }
        if self.channel_order.is_some() && (what == "value" || self.span == Span::Heads) {
            return Err(Error::unsupported(format!("{what}.channel_order"), "only keys whose blocks stay inside a head"));
        }
        Ok(())
    }
}

impl Scheme {
    /// Checks everything that does not depend on a model's shape.
    pub fn check(&self) -> Result<()> {
        if self.version != SCHEME_VERSION {
            let expected = format!("{SCHEME_VERSION} (this build's)");
            return Err(Error::value("scheme version", expected, self.version));
        }
        if self.residual_length > 4096 {
            return Err(Error::value("residual_length", "0 to 4096", self.residual_length));
        }
        if self.sink_tokens > 4096 {
            return Err(Error::value("sink_tokens", "0 to 4096", self.sink_tokens));
        }
        self.key.check("key")?;
        self.value.check("value")
    }

    /// Parses and checks the JSON form.
    pub fn from_json(text: &str) -> Result<Self> {
        let scheme: Self =
            serde_json::from_str(text).map_err(|e| Error::value("scheme", "a JSON object of the scheme form", e))?;
        scheme.check()?;
        Ok(scheme)
    }

    /// The JSON form.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a scheme has only serialisable fields")
    }

    /// Whether every token can be written on its own, into an open page: no window, and no block along tokens.
    pub fn writes_single_slots(&self) -> bool {
        self.residual_length == 0 && self.key.axis == Axis::Channel && self.value.axis == Axis::Channel
    }

    /// Names of the presets.
    pub fn presets() -> &'static [&'static str] {
        &["nqkv4", "nqkv", "nqkv4-signed", "kivi4", "kivi2"]
    }

    /// A preset by name.
    ///
    /// - `nqkv4`, the default: keys NF4, one block per channel and page with mean; values NF4 in blocks of 64 channels;
    ///   4 sinks, the newest 32 to 95 tokens exact.
    /// - `nqkv`: the recipe of arXiv 2505.16210: NF4, blocks of 256 channels over concatenated heads, absmax in fp16.
    /// - `nqkv4-signed`: `nqkv4` with values in the L2-fitted signed-absmax code: the same bytes.
    /// - `kivi4`, `kivi2`: the recipe of arXiv 2402.02750, group 32, residual 128 (zero point in the middle of the range).
    pub fn preset(name: &str) -> Result<Self> {
        let side = |codebook: &str, axis, block, scale| SideSpec {
            codebook: BookSpec::Name(codebook.into()),
            axis,
            block,
            span: Span::Head,
            scale,
            scale_dtype: ScaleDtype::Fp16,
            widths: None,
            channel_order: None,
        };
        let scheme = |key, value, residual_length, sink_tokens| Self {
            version: SCHEME_VERSION,
            name: name.into(),
            key,
            value,
            residual_length,
            sink_tokens,
            exact_dtype: None,
            skip_layers: Vec::new(),
        };
        let channel_mean = side("nf4", Axis::Token, 64, ScaleKind::MeanAbsmax);
        let kivi = |book: &str| {
            let key = side(book, Axis::Token, 32, ScaleKind::Minmax);
            scheme(key, side(book, Axis::Channel, 32, ScaleKind::Minmax), 128, 0)
        };
        Ok(match name {
            "nqkv4" => scheme(channel_mean, side("nf4", Axis::Channel, 64, ScaleKind::Absmax), 32, 4),
            "nqkv4-signed" => scheme(channel_mean, side("l2signed4-64", Axis::Channel, 64, ScaleKind::SignedAbsmax), 32, 4),
            "nqkv" => {
                let both = SideSpec { span: Span::Heads, ..side("nf4", Axis::Channel, 256, ScaleKind::Absmax) };
                scheme(both.clone(), both, 0, 0)
            }
            "kivi4" => kivi("uniform4"),
            "kivi2" => kivi("uniform2"),
            _ => return Err(Error::value("scheme", format!("one of {}", Self::presets().join(", ")), format!("{name:?}"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_round_trip_through_json() {
        for name in Scheme::presets() {
            let scheme = Scheme::preset(name).unwrap();
            assert_eq!(Scheme::from_json(&scheme.to_json()).unwrap(), scheme);
        }
    }

    #[test]
    fn refusals_say_what_was_expected() {
        let with = |f: &dyn Fn(&mut Scheme)| {
            let mut s = Scheme::preset("nqkv4").unwrap();
            f(&mut s);
            s.check().unwrap_err().to_string()
        };
        assert!(with(&|s| s.key.block = 48).contains("16, 32 or 64 along tokens, got 48"));
        assert!(with(&|s| s.value.axis = Axis::Token).contains("axis \"channel\""));
        assert!(with(&|s| s.version = 2).contains("got 2"));
        assert!(Scheme::preset("nope").unwrap_err().to_string().contains("nqkv4"));
        assert!(Scheme::from_json("{\"nme\": 1}").unwrap_err().to_string().contains("unknown field"));
    }
}
