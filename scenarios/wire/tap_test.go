package wire

import (
	"strings"
	"sync/atomic"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// tap sees every message of ours that this process sends, and says what is sent.
var tap atomic.Pointer[func(proto.Message) proto.Message]

// tapped is gRPC's codec for protobuf with the tap before it. Registered under the same
// name, it is that of every client and server in the process.
type tapped struct{ encoding.CodecV2 }

func init() { encoding.RegisterCodecV2(tapped{encoding.GetCodecV2("proto")}) }

func (c tapped) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(proto.Message); ok && strings.HasPrefix(string(m.ProtoReflect().Descriptor().FullName()), "entente.") {
		if f := tap.Load(); f != nil {
			v = (*f)(m)
		}
	}
	return c.CodecV2.Marshal(v)
}
