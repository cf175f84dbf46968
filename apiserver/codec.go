package apiserver

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// maxElements bounds the fields and elements of one message, over all its levels. A write of 1,000 resources with twenty labels each has less than half as many; without a bound, a
// message of 4 MiB could have two million empty elements, each of which is a hundred bytes of memory.
const maxElements = 200_000

var errTooManyElements = fmt.Errorf("the message has more than %d fields and elements: send fewer at once", maxElements)

// codecs are Connect's own, but count before they decode, and decompress no more than maxBytes.
func codecs(maxBytes int) connect.HandlerOption {
	return connect.WithHandlerOptions(connect.WithCodec(binaryCodec{}), connect.WithCodec(jsonCodec{"json"}), connect.WithCodec(jsonCodec{"json; charset=utf-8"}),
		connect.WithCompression("gzip", func() connect.Decompressor { return &boundedGzip{max: int64(maxBytes)} }, func() connect.Compressor { return gzip.NewWriter(io.Discard) }))
}

var errNotProto = errors.New("is no protobuf message")

type binaryCodec struct{}

func (binaryCodec) Name() string { return "proto" }

func (binaryCodec) IsBinary() bool { return true }

func (c binaryCodec) Marshal(m any) ([]byte, error) { return c.MarshalAppend(nil, m) }

func (binaryCodec) MarshalAppend(to []byte, m any) ([]byte, error) {
	if m, ok := m.(proto.Message); ok {
		return proto.MarshalOptions{}.MarshalAppend(to, m)
	}
	return nil, errNotProto
}

func (binaryCodec) MarshalStable(m any) ([]byte, error) {
	if m, ok := m.(proto.Message); ok {
		return proto.MarshalOptions{Deterministic: true}.Marshal(m)
	}
	return nil, errNotProto
}

func (binaryCodec) Unmarshal(data []byte, m any) error {
	message, ok := m.(proto.Message)
	if !ok {
		return errNotProto
	}
	left := maxElements
	if err := countElements(data, message.ProtoReflect().Descriptor(), &left, protowire.DefaultRecursionLimit); err != nil {
		return err
	}
	return proto.Unmarshal(data, message)
}

// countElements takes from left what data has, and fails when nothing is left. Contents of strings are skipped. What is malformed is left to the decoder to say.
func countElements(data []byte, message protoreflect.MessageDescriptor, left *int, depth int) error {
	if depth == 0 {
		return nil
	}
	for len(data) > 0 {
		if *left--; *left < 0 {
			return errTooManyElements
		}
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return nil
		}
		data = data[n:]
		if n = protowire.ConsumeFieldValue(number, kind, data); n < 0 {
			return nil
		}
		if f := message.Fields().ByNumber(number); kind == protowire.BytesType && f != nil && f.Message() != nil {
			inner, _ := protowire.ConsumeBytes(data)
			if err := countElements(inner, f.Message(), left, depth-1); err != nil {
				return err
			}
		}
		data = data[n:]
	}
	return nil
}

// boundedGzip decompresses at most max bytes of a message, and one: Connect would read on to the end to say how long it is.
type boundedGzip struct {
	gzip.Reader
	max, left int64
}

func (b *boundedGzip) Reset(r io.Reader) error {
	b.left = b.max + 1
	return b.Reader.Reset(r)
}

// Read implements io.Reader.
func (b *boundedGzip) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errors.New("it is not read to its end")
	}
	n, err := b.Reader.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

type jsonCodec struct{ name string }

func (c jsonCodec) Name() string { return c.name }

func (jsonCodec) IsBinary() bool { return false }

func (c jsonCodec) Marshal(m any) ([]byte, error) { return c.MarshalAppend(nil, m) }

func (jsonCodec) MarshalAppend(to []byte, m any) ([]byte, error) {
	if m, ok := m.(proto.Message); ok {
		return protojson.MarshalOptions{}.MarshalAppend(to, m)
	}
	return nil, errNotProto
}

func (jsonCodec) Unmarshal(data []byte, m any) error {
	message, ok := m.(proto.Message)
	switch {
	case !ok:
		return errNotProto
	case len(data) == 0:
		return errors.New("an empty message is no JSON object")
	case elementsOfJSON(data) > maxElements:
		return errTooManyElements
	}
	// Callers of another version may know fields that this one does not.
	return protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(data, message)
}

// elementsOfJSON counts the members and elements of all objects and arrays in data, without those that are the first.
func elementsOfJSON(data []byte) (n int) {
	quoted := false
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case !quoted && (c == ',' || c == '{' || c == '['):
			n++
		}
	}
	return n
}
