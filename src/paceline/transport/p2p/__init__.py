"""The nccl and gloo transports: a row's tensors on a two-rank communicator, its header in the HTTP reply.

One implementation: both kinds move one buffer of bytes (uint8) a row, device to device (nccl) or host to host (gloo).
The communicator is made directly on a store of ours whose keys travel in the session's HTTP calls. Rank 0 is the
server, rank 1 the client.

**Rows.** The request is the credit: a client takes a row's memory before it asks for it. The server packs the features
into one buffer, numbers it, and answers with a header that names the channel's epoch and the row's number in it. When
that header has left, the buffer is sent, strictly by number. Headers come over several connections in any order; the
client posts its receives by number.

**Epochs.** A communicator that failed once is never used again; the channel then goes on with another one, and its
epoch goes up. Rows belong to one epoch and are lost with it: their requests fail with TransportError, and are asked
again. Either side gives an epoch up when: the peer or its connection dies; a transfer, or a header that others have
overtaken, does not come within `transport.stall_timeout_s`; a header could not be sent, or a reply was lost (its
tensors may or may not come); the other side has given it up.

**Keys** of the session's store, by which an epoch begins:

    proposal        client: "E:NONCE"   begin an epoch, E or later; NONCE is new
    joined          server: "E:NONCE"   answers that NONCE: the epoch is E, and I am connecting
    E/...           both                what gloo and NCCL exchange to connect; forgotten when the next epoch begins

Only the client proposes. A server that gives up epoch E numbers its next rows in epoch E + 1 and answers as always:
a client that sees a later epoch than its own in a header knows that its own is over, and proposes. Both sides connect
only after `joined`, so neither waits long for one that is not there; then the server sends 256 bytes made of NONCE,
and the epoch is open once they have arrived.
"""
