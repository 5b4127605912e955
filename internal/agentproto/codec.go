package agentproto

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/fxamacker/cbor/v2"
)

// ErrFrameLength reports a frame whose length field is impossible. The link or
// connection it came from must be ended: there is no way to find the next frame.
var ErrFrameLength = errors.New("agentproto: frame length out of range")

// Frame is one unit of the wire. Body is a CBOR envelope, see [Encode].
type Frame struct {
	ID    uint32
	Flags uint8
	Body  []byte
}

// bodyOverhead is what the length field counts beside the body.
const bodyOverhead = 5

// firstRead bounds what is allocated on the word of a length field alone.
const firstRead = 64 << 10

// Reader reads frames from a byte stream. It is not safe for concurrent use.
type Reader struct {
	r   io.Reader
	max int
	hdr [FrameHeaderLen]byte
}

// NewReader returns a reader that refuses frames whose length field is above
// max bytes ([MaxFrame], [MaxLinkFrame]).
func NewReader(r io.Reader, max int) *Reader { return &Reader{r: r, max: max} }

// ReadFrame returns the next frame; its body is freshly allocated. The error is
// io.EOF at a frame border, io.ErrUnexpectedEOF inside a frame and
// [ErrFrameLength] for an impossible length.
func (r *Reader) ReadFrame() (Frame, error) {
	if _, err := io.ReadFull(r.r, r.hdr[:4]); err != nil {
		return Frame{}, err
	}
	n := binary.BigEndian.Uint32(r.hdr[:4])
	if n < bodyOverhead || int64(n) > int64(r.max) {
		return Frame{}, fmt.Errorf("%w: %d", ErrFrameLength, n)
	}
	if _, err := io.ReadFull(r.r, r.hdr[4:]); err != nil {
		return Frame{}, noEOF(err)
	}
	body, err := r.readBody(int(n) - bodyOverhead)
	if err != nil {
		return Frame{}, err
	}
	return Frame{ID: binary.BigEndian.Uint32(r.hdr[4:8]), Flags: r.hdr[8], Body: body}, nil
}

// readBody reads n bytes. Memory follows the bytes that really arrive, so that
// a length field alone costs its reader no more than firstRead.
func (r *Reader) readBody(n int) ([]byte, error) {
	body := make([]byte, min(n, firstRead))
	for have := 0; ; {
		if _, err := io.ReadFull(r.r, body[have:]); err != nil {
			return nil, noEOF(err)
		}
		have = len(body)
		if have == n {
			return body, nil
		}
		body = append(make([]byte, 0, min(n, 4*have)), body...)
		body = body[:cap(body)]
	}
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// AppendFrame appends the wire form of f to dst.
func AppendFrame(dst []byte, f Frame) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(f.Body)+bodyOverhead))
	dst = binary.BigEndian.AppendUint32(dst, f.ID)
	dst = append(dst, f.Flags)
	return append(dst, f.Body...)
}

// Writer writes frames to a byte stream, each with one call of Write. It is not
// safe for concurrent use.
type Writer struct {
	w   io.Writer
	max int
	buf []byte
}

// NewWriter returns a writer that refuses frames longer than max bytes.
func NewWriter(w io.Writer, max int) *Writer { return &Writer{w: w, max: max} }

// WriteFrame writes f. A frame beyond the limit is an error and writes nothing.
func (w *Writer) WriteFrame(f Frame) error {
	if len(f.Body)+bodyOverhead > w.max {
		return fmt.Errorf("%w: %d", ErrFrameLength, len(f.Body)+bodyOverhead)
	}
	w.buf = AppendFrame(w.buf[:0], f)
	_, err := w.w.Write(w.buf)
	if cap(w.buf) > MaxLinkFrame+FrameHeaderLen {
		w.buf = nil
	}
	return err
}

// WriteFrame writes one frame with one call of Write and no limit but MaxFrame.
func WriteFrame(w io.Writer, f Frame) error { return NewWriter(w, MaxFrame).WriteFrame(f) }

// Limits of decoding. Payloads are bounded by the frame; these bound what a
// frame may make its reader allocate beyond its own length.
const (
	maxNesting = 16
	maxPairs   = 64
)

var (
	encMode = must(cbor.EncOptions{NilContainers: cbor.NilContainerAsEmpty}.EncMode())
	// Text that is not UTF-8 is accepted: guest file names are bytes.
	decMode = must(cbor.DecOptions{
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		MaxNestedLevels:  maxNesting,
		MaxArrayElements: MaxElements,
		MaxMapPairs:      maxPairs,
		TagsMd:           cbor.TagsForbidden,
		UTF8:             cbor.UTF8DecodeInvalid,
	}.DecMode())
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Encode returns the body of a frame: an envelope of type typ around the CBOR
// form of payload; nil stands for an empty map.
func Encode(typ string, payload any) ([]byte, error) {
	if d, ok := payload.(Data); ok {
		return EncodeData(typ, d.Data), nil
	}
	p := []byte{0xa0}
	if c, ok := payload.(compact); ok {
		p = c.appendCBOR(nil)
	} else if payload != nil {
		var err error
		if p, err = encMode.Marshal(payload); err != nil {
			return nil, fmt.Errorf("agentproto: encode %s: %w", typ, err)
		}
	}
	return append(appendEnvelope(make([]byte, 0, len(p)+len(typ)+16), typ, len(p)), p...), nil
}

// MustEncode is Encode for payload types of this package, which cannot fail.
func MustEncode(typ string, payload any) []byte { return must(Encode(typ, payload)) }

// EncodeData returns the body of a data frame: [Data] with the given bytes.
func EncodeData(typ string, data []byte) []byte {
	const key = "\xa1\x64data" // map(1), text(4)
	n := len(key) + headLen(len(data)) + len(data)
	b := appendEnvelope(make([]byte, 0, n+len(typ)+16), typ, n)
	b = append(b, key...)
	b = appendHead(b, majorBytes, len(data))
	return append(b, data...)
}

// DataOverhead is the most that EncodeData adds to the data of a data frame.
const DataOverhead = 64

// appendEnvelope appends {"v": Generation, "t": typ, "p": <n bytes follow>}.
func appendEnvelope(b []byte, typ string, n int) []byte {
	b = append(b, 0xa3, 0x61, 'v', Generation, 0x61, 't')
	b = appendHead(b, majorText, len(typ))
	b = append(b, typ...)
	b = append(b, 0x61, 'p')
	return appendHead(b, majorBytes, n)
}

// envelope is the body of a frame in the library's eyes.
type envelope struct {
	V uint8  `cbor:"v"`
	T string `cbor:"t"`
	P []byte `cbor:"p"`
}

// Decode opens the envelope of a frame body. The payload may alias body.
func Decode(body []byte) (typ string, v uint8, payload []byte, err error) {
	if typ, v, payload, ok := decodeEnvelope(body); ok {
		return typ, v, payload, nil
	}
	var e envelope
	if err := decMode.Unmarshal(body, &e); err != nil {
		return "", 0, nil, fmt.Errorf("agentproto: envelope: %w", err)
	}
	if e.T == "" || e.P == nil {
		return "", 0, nil, errors.New("agentproto: envelope lacks a type or a payload")
	}
	return e.T, e.V, e.P, nil
}

// Unmarshal decodes a payload into the struct x points to. Unknown fields are
// ignored, absent ones keep their zero value.
func Unmarshal(payload []byte, x any) error {
	switch x := x.(type) {
	case *Boot:
		if takeAll(payload, x) {
			return nil
		}
	case *Exec:
		if takeAll(payload, x) {
			return nil
		}
	}
	if err := decMode.Unmarshal(payload, x); err != nil {
		return fmt.Errorf("agentproto: payload: %w", err)
	}
	return nil
}

// DecodeData returns the bytes of a [Data] payload, aliasing payload if it can.
func DecodeData(payload []byte) ([]byte, error) {
	const key = "\xa1\x64data"
	if len(payload) > len(key) && string(payload[:len(key)]) == key {
		if d, rest, ok := takeString(payload[len(key):], majorBytes); ok && len(rest) == 0 {
			return d, nil
		}
	}
	var d Data
	if err := Unmarshal(payload, &d); err != nil {
		return nil, err
	}
	return d.Data, nil
}
