//! The numbers that name things across the processes of qrelay. Each kind is a type of its own, so
//! that the compiler rejects a worker's number in place of a job's.

/// Defines types of numbers that count up from 1 while the supervisor lives.
///
/// Each type can be ordered, hashed, logged and sent between processes. [`Default`] is 0, which
/// names nothing.
#[macro_export]
macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident;)+) => {$(
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash,
            $crate::ids::serde::Serialize, $crate::ids::serde::Deserialize,
        )]
        #[serde(crate = "qrelay_shared::ids::serde")]
        pub struct $name(pub u64);

        impl $name {
            /// Counts up, and returns the new number.
            pub fn advance(&mut self) -> Self {
                self.0 += 1;
                *self
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = std::num::ParseIntError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }

        impl $crate::ids::slog::Value for $name {
            fn serialize(
                &self,
                _: &$crate::ids::slog::Record<'_>,
                key: $crate::ids::slog::Key,
                serializer: &mut dyn $crate::ids::slog::Serializer,
            ) -> $crate::ids::slog::Result {
                serializer.emit_u64(key, self.0)
            }
        }
    )+};
}

// For crates that use the macro and need not depend on these themselves.
#[doc(hidden)]
pub use {serde, slog};

ids! {
    /// Names a connection from its accept to its end. Of two connections to one listening socket,
    /// the one that was made first has the lower number.
    JobId;
    /// Names a worker.
    WorkerId;
    /// Names a listening socket of the supervisor. A listener of the configuration can have
    /// several: `systemd` stands for every socket that systemd passed.
    ListenerId;
}
