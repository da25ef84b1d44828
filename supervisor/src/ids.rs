//! The numbers that name things inside the supervisor.

pub use qrelay_shared::ids::{JobId, ListenerId, WorkerId};

qrelay_shared::ids! {
    /// Names a generation: one loading of the configuration.
    GenerationId;
    /// Names a zygote or a standby.
    ZygoteId;
    /// Names a client of the control socket.
    AdminId;
    /// Names a channel on which a worker or a zygote asks for shared dictionaries.
    ChannelId;
}
