---@meta qrelay

-- Definitions of what qrelay adds to Lua 5.3, for the Lua language server: completion, types and
-- short descriptions in an editor. docs/lua/README.md says how to use them, and the pages beside it
-- describe each function in full. No script is to load this file.

-- ---------------------------------------------------------------------------- Listening

---A handler decides about one mail. The last value that it returns is the action.
---@alias qrelay.Handler fun(mail: qrelay.Mail): qrelay.Action

---Sockets that systemd has passed. `systemd['name']` stands for those with this
---FileDescriptorName.
---@class qrelay.Systemd
---@field [string] qrelay.Systemd

---The sockets that systemd has passed and that no other listener names.
---@type qrelay.Systemd
systemd = nil

---Largest message in bytes that later listeners accept, 1024 … 1073741824.
---@type integer?
max_size = 16777216

---Address of the Pond server that gets a datagram for each mail.
---@type string|qrelay.Address|nil
log_server = nil

---The script may define this function. A reload calls it once, after the script has run.
---@type fun()|nil
reload = nil

---@class qrelay.ListenOptions
---@field mode? string Mode of the socket file, octal digits, such as '0660'.
---@field owner? string|integer Owner of the socket file.
---@field group? string|integer Group of the socket file.
---@field backlog? integer Connections that may wait in the kernel, 1 … 65535.
---@field max_size? integer Bytes of a message, 1024 … 1073741824.
---@field allow? string[] Networks whose clients are served, such as '10.0.0.0/8'.

---Listens for clients, and calls the handler for every mail. Only while the script is loaded.
---@param where string|qrelay.Systemd '/path', '@name', 'IP:port', or the variable `systemd`
---@param handler qrelay.Handler
---@param options? qrelay.ListenOptions
function qmqp_listen(where, handler, options) end

---@class qrelay.Settings
---@field workers? integer Worker processes, 1 … 256.
---@field worker_connections? integer Mails at once per worker, 1 … 4096.
---@field client_share? number Part of the capacity that one client may hold, at most 1.
---@field max_connections_per_uid? integer Open connections per user id; 0 is no limit.
---@field worker_max_mails? integer Mails after which a worker is replaced; 0 is never.
---@field client_timeout? number Seconds without a byte of a request.
---@field request_timeout? number Seconds for a whole request.
---@field request_min_rate? integer Fewest bytes per second of a request.
---@field relay_timeout? number Seconds from the end of the request to the answer.
---@field connect_timeout? number Seconds per address of a `connect`.
---@field handler_timeout? number Seconds that a handler may run, not counting waits.
---@field hang_timeout? number Seconds that Lua may be held; longer than `handler_timeout`.
---@field drain_timeout? number Seconds that replaced workers may finish their mails.
---@field lua_memory_limit? integer Bytes of Lua's memory per worker.
---@field mail_memory? integer Bytes of messages in memory per worker.
---@field shared_memory? integer Bytes per shared dictionary.
---@field shared_memory_total? integer Bytes of all shared dictionaries together.
---@field max_hops? integer `Received` fields that a message may have, 1 … 1000.
---@field default_domain? string Domain of addresses without a domain.
---@field sandbox? boolean Whether workers and programs are kept from other processes.
---@field user? string|integer User to become, if qrelay is started as root.
---@field group? string|integer Primary group to get; needs `user`.

---Changes settings. Only while the script is loaded.
---@param settings qrelay.Settings
function settings(settings) end

-- --------------------------------------------------------------------------- The mail

---A mail, while its handler runs.
---@class qrelay.Mail
---@field sender string Envelope sender; '' for a bounce.
---@field recipients string[] Envelope recipients; assign a list to change them.
---@field account string? A name for the log.
---@field pid integer? (read only) The client's process id.
---@field uid integer? (read only) The client's user id.
---@field gid integer? (read only) The client's group id.
---@field cgroup qrelay.Cgroup? (read only) The client's control group.
---@field peer string (read only) The client as text.
---@field listener string (read only) Address of the listener.
---@field size integer (read only) Bytes of the message as it came in.
---@field id string (read only) A name that no other mail has.
local Mail = {}

---Returns the first field of the header with this name.
---@param name string
---@return string?
function Mail:header(name) end

---Returns all fields of the header with this name.
---@param name string
---@return string[]
function Mail:headers(name) end

---Puts a line in front of the message.
---@param name string
---@param value any A string, a number, or anything with `__tostring`.
function Mail:insert_header(name, value) end

---Leaves all fields with this name out, and returns their number.
---@param name string
---@return integer
function Mail:remove_header(name) end

---@class qrelay.ConnectOptions
---@field timeout? number Seconds for all addresses together, at most 3600.
---@field connect_timeout? number Seconds per address, at most 3600.
---@field order? 'random' Tries the addresses in random order.

---Relays the mail by QMQP to the first address that can be connected to.
---@param address string|qrelay.Address|(string|qrelay.Address)[]
---@param options? qrelay.ConnectOptions
---@return qrelay.Action
---@nodiscard
function Mail:connect(address, options) end

---Answers `K`, and sends the mail nowhere.
---@param text? string|number
---@return qrelay.Action
---@nodiscard
function Mail:discard(text) end

---Answers `D`: the mail can never be sent.
---@param text? string|number
---@return qrelay.Action
---@nodiscard
function Mail:reject(text) end

---Answers `Z`: the client tries again later.
---@param text? string|number
---@return qrelay.Action
---@nodiscard
function Mail:defer(text) end

---@class qrelay.ExecOptions
---@field env? table<string, string|number> The program's whole environment.
---@field timeout? number Seconds, at most 3600.

---Runs a program that speaks QMQP on standard input and output.
---@param program string A path with a '/'.
---@param ... string|number|qrelay.ExecOptions Arguments; options may come last.
---@return qrelay.Action
---@nodiscard
function Mail:exec(program, ...) end

---Runs a program that reads the message from standard input, such as sendmail.
---@param program string A path with a '/'.
---@param ... string|number|qrelay.ExecOptions Arguments; options may come last.
---@return qrelay.Action
---@nodiscard
function Mail:exec_raw(program, ...) end

---What is to be done with a mail.
---@class qrelay.Action

---A control group (cgroup v2).
---@class qrelay.Cgroup
---@field path string (read only) As in /proc/PID/cgroup.
---@field xattr table<string, string?> (read only) The group's extended attributes.
---@field parent qrelay.Cgroup? (read only) The group above.

-- --------------------------------------------------------------------------- Addresses

---The address of a server, with a host name looked up.
---@class qrelay.Address

---Returns the address of a QMQP server (default port 628).
---@param text string
---@return qrelay.Address
function qmqp_resolve(text) end

---Returns the address of a Pond server (default port 5479).
---@param text string
---@return qrelay.Address
function log_resolve(text) end

---Returns the address of a beng-proxy (default port 5478).
---@param text string
---@return qrelay.Address
function control_resolve(text) end

-- --------------------------------------------------------------------------- Time

---Waits, while the handlers of other mails run.
---@param seconds number 0 … 3600
function sleep(seconds) end

---Calls the function again and again in every worker. Only while the script is loaded.
---@param seconds number 0.01 … 86400
---@param fn fun()
function every(seconds, fn) end

-- --------------------------------------------------------------------------- Log

---@alias qrelay.Fields table<string, any>

---Records with a level and fields.
log = {}

---@param text string|number
---@param fields? qrelay.Fields
function log.debug(text, fields) end

---@param text string|number
---@param fields? qrelay.Fields
function log.info(text, fields) end

---@param text string|number
---@param fields? qrelay.Fields
function log.warn(text, fields) end

---@param text string|number
---@param fields? qrelay.Fields
function log.error(text, fields) end

-- --------------------------------------------------------------------------- Shared dictionaries

---@alias qrelay.Value string|number|boolean

---Dictionaries that all workers share.
shared = {}

---Returns a handle for the dictionary of this name.
---@param name string 1 to 64 of a-z, 0-9 and _
---@return qrelay.Dictionary
function shared:new(name) end

---@class qrelay.Dictionary
local Dictionary = {}

---@param key string|number
---@return qrelay.Value? value
---@return string? message
function Dictionary:get(key) end

---Stores a value, for `ttl` seconds if given.
---@param key string|number
---@param value qrelay.Value
---@param ttl? number
---@return true? stored
---@return string? message
function Dictionary:set(key, value, ttl) end

---Stores a value unless the key is there.
---@param key string|number
---@param value qrelay.Value
---@param ttl? number
---@return boolean? stored
---@return string? message
function Dictionary:add(key, value, ttl) end

---Adds a number, and returns the sum. `ttl` counts from the key's creation.
---@param key string|number
---@param by? number
---@param ttl? number
---@return number? sum
---@return string? message
function Dictionary:incr(key, by, ttl) end

---@param key string|number
---@return boolean? deleted
---@return string? message
function Dictionary:delete(key) end

---@param max? integer
---@return string[]? keys
---@return string? message
function Dictionary:keys(max) end

-- --------------------------------------------------------------------------- Sockets

---Sending to other programs.
socket = {}

---@class qrelay.SocketOptions
---@field type? 'stream'|'dgram'|'seqpacket'

---@param address string|qrelay.Address
---@param options? qrelay.SocketOptions
---@return qrelay.Socket? socket
---@return string? message
function socket:connect(address, options) end

---@class qrelay.Socket
local Socket = {}

---Sends the data from byte `i` to byte `j`.
---@param data string|number
---@param i? integer
---@param j? integer
---@return integer? bytes
---@return string? message
function Socket:send(data, i, j) end

---@return true? closed
---@return string? message
function Socket:close() end

-- --------------------------------------------------------------------------- beng-proxy

---Commands to beng-proxy.
control_client = {}

---@param address string|qrelay.Address
---@return qrelay.ControlClient
function control_client:new(address) end

---@class qrelay.ControlClient
local ControlClient = {}

---Returns an empty list of commands.
---@return qrelay.ControlBuilder
function ControlClient:build() end

---@param builder qrelay.ControlBuilder
---@return integer? bytes
---@return string? message
function ControlClient:send(builder) end

---@class qrelay.ControlBuilder
local ControlBuilder = {}

---@param ... string|number tags
---@return qrelay.ControlBuilder
function ControlBuilder:fade_children(...) end

---@param ... string|number tags
---@return qrelay.ControlBuilder
function ControlBuilder:terminate_children(...) end

---@param ... string|number tags
---@return qrelay.ControlBuilder
function ControlBuilder:flush_filter_cache(...) end

---@param ... string|number tags
---@return qrelay.ControlBuilder
function ControlBuilder:flush_http_cache(...) end

---@param ... string|number ids of sessions
---@return qrelay.ControlBuilder
function ControlBuilder:discard_session(...) end

---@param ... string|number tags
---@return qrelay.ControlBuilder
function ControlBuilder:disconnect_database(...) end

---@param ... string|number accounts
---@return qrelay.ControlBuilder
function ControlBuilder:reset_limiter(...) end

---@param ... string|number addresses
---@return qrelay.ControlBuilder
function ControlBuilder:reject_client(...) end

---@param ... string|number addresses
---@return qrelay.ControlBuilder
function ControlBuilder:tarpit_client(...) end

---@param partition string|number
---@param id string|number
---@return qrelay.ControlBuilder
function ControlBuilder:cancel_job(partition, id) end

-- --------------------------------------------------------------------------- JSON and tokens

json = {}

---A value that stands for `null`.
---@type userdata
json.null = nil

---@class qrelay.JsonOptions
---@field null? boolean A `null` becomes `json.null` instead of nil.

---@param value any
---@return string
function json.dump(value) end

---@param text string|number
---@param options? qrelay.JsonOptions
---@return any value
---@return string? message
function json.parse(text, options) end

---Tokens that are signed with Ed25519 keys.
jwt = {}

---@param sk string Secret key of 64 bytes.
---@param header table?
---@param payload table
---@return string token
function jwt.sign(sk, header, payload) end

---@param token string
---@param pk string Public key of 32 bytes.
---@return table? payload
---@return table|string header The header, or the message if the token isn't valid.
function jwt.verify(token, pk) end

-- --------------------------------------------------------------------------- Cryptography

sodium = {}

---@param bytes string|number
---@return string
function sodium.bin2hex(bytes) end

---@param hex string|number
---@return string?
function sodium.hex2bin(hex) end

---@param n integer 1 … 1048576
---@return string
function sodium.randombytes(n) end

---@return string pk
---@return string sk
function sodium.crypto_box_keypair() end

---@param message string|number
---@param pk string
---@return string
function sodium.crypto_box_seal(message, pk) end

---@param ciphertext string
---@param pk string
---@param sk string
---@return string?
function sodium.crypto_box_seal_open(ciphertext, pk, sk) end

---@param sk string
---@return string pk
function sodium.crypto_scalarmult_base(sk) end

---@return string pk
---@return string sk
function sodium.crypto_sign_keypair() end

---@param message string|number
---@param sk string
---@return string signature
function sodium.crypto_sign_detached(message, sk) end

---@param signature string
---@param message string|number
---@param pk string
---@return boolean
function sodium.crypto_sign_verify_detached(signature, message, pk) end

-- --------------------------------------------------------------------------- PostgreSQL

---PostgreSQL.
pg = {}

---@class qrelay.DatabaseOptions
---@field max_connections? integer Connections per worker, 1 … 1000.

---Declares a database. Connections are opened when queries need them.
---@param conninfo string
---@param schema? string
---@param options? qrelay.DatabaseOptions
---@return qrelay.Database
function pg:new(conninfo, schema, options) end

---@param list table
---@return string
function pg:encode_array(list) end

---@param text string
---@return table? list
---@return string? message
function pg:decode_array(text) end

---@class qrelay.Database
local Database = {}

---Runs a statement; `params` are the values of `$1`, `$2` …
---@param sql string
---@param params? table
---@return qrelay.Result? result
---@return string? message
function Database:execute(sql, params) end

---Calls the function in a transaction.
---@param f fun(tx: qrelay.Transaction): ...
---@return any result What the function returns, or true.
---@return any message
function Database:transaction(f) end

---Calls the function in every worker when the channel is notified.
---@param name string
---@param f fun(payload: string?)
function Database:listen(name, f) end

---@class qrelay.Transaction
local Transaction = {}

---@param sql string
---@param params? table
---@return qrelay.Result? result
---@return string? message
function Transaction:execute(sql, params) end

---@class qrelay.Result
local Result = {}

---Returns the next row, nil at the end.
---@param row? table
---@param mode? 'a'|'n'
---@return table<string|integer, string>? row
---@return string? message
function Result:fetch(row, mode) end

---@param mode? 'a'|'n'
---@return fun(): table<string|integer, string>?
function Result:rows(mode) end

---@return integer
function Result:affected() end

-- --------------------------------------------------------------------------- Lua 5.1 and LuaJIT

---@deprecated
unpack = table.unpack

---@deprecated
loadstring = load

---@deprecated
---@return integer kilobytes
function gcinfo() end

---@param x number
---@param y number
---@return number
---@deprecated
function math.pow(x, y) end

---@param x number
---@return number
---@deprecated
function math.log10(x) end

---@param y number
---@param x number
---@return number
---@deprecated
function math.atan2(y, x) end

---@param x number
---@return number
---@deprecated
function math.cosh(x) end

---@param x number
---@return number
---@deprecated
function math.sinh(x) end

---@param x number
---@return number
---@deprecated
function math.tanh(x) end

---@param x number
---@return number mantissa
---@return integer exponent
---@deprecated
function math.frexp(x) end

---@param m number
---@param e integer
---@return number
---@deprecated
function math.ldexp(m, e) end

---@param t table
---@return number
---@deprecated
function table.maxn(t) end

---@param t table
---@return integer
---@deprecated
function table.getn(t) end

---@param t table
---@param f fun(key: any, value: any): any
---@deprecated
function table.foreach(t, f) end

---@param t table
---@param f fun(index: integer, value: any): any
---@deprecated
function table.foreachi(t, f) end

---@deprecated
package.loaders = package.searchers

---The library of LuaJIT; results are signed 32-bit integers.
bit = {}

---@param n number
---@return integer
function bit.tobit(n) end

---@param n number
---@return integer
function bit.bnot(n) end

---@param first number
---@param ... number
---@return integer
function bit.band(first, ...) end

---@param first number
---@param ... number
---@return integer
function bit.bor(first, ...) end

---@param first number
---@param ... number
---@return integer
function bit.bxor(first, ...) end

---@param n number
---@param by number
---@return integer
function bit.lshift(n, by) end

---@param n number
---@param by number
---@return integer
function bit.rshift(n, by) end

---@param n number
---@param by number
---@return integer
function bit.arshift(n, by) end

---@param n number
---@param by number
---@return integer
function bit.rol(n, by) end

---@param n number
---@param by number
---@return integer
function bit.ror(n, by) end

---@param n number
---@return integer
function bit.bswap(n) end

---@param n number
---@param digits? integer
---@return string
function bit.tohex(n, digits) end
