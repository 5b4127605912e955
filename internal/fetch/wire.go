package fetch

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// The two ends of msb-fetch are of one release, and talk like this. Its standard
// input starts with an Access as JSON, one line, and stays open as long as it is
// wanted. Requests come by a socket of packets at descriptor RequestFD, each with
// the write end of a pipe for its answer: a line of JSON (answer), then, if there
// is a body, pieces with their length in front, 4 bytes, big endian. Length 0
// ends the body; broken is followed by what went wrong.

// RequestFD is the number of the socket in msb-fetch.
const RequestFD = 3

// MaxPacket bounds a request, MaxAccess the first line.
const (
	MaxPacket = 16 << 10
	MaxAccess = 4 << 20
)

const (
	maxPiece  = 256 << 10
	maxAnswer = 64 << 10
	broken    = ^uint32(0)
)

type answer struct {
	Start int64  `json:"start"`
	Error *Error `json:"error,omitempty"`
}

// WriteAnswer sends what Get returned to w, and the body to its end.
func WriteAnswer(w io.Writer, resp *Response, err error) error {
	var a answer
	if err != nil {
		var e *Error
		if !errors.As(err, &e) {
			e = &Error{Message: err.Error()}
		}
		e.Message = e.Message[:min(len(e.Message), maxAnswer/8)]
		a.Error = e
	} else {
		a.Start = resp.Start
		defer resp.Body.Close()
	}
	line, jerr := json.Marshal(a)
	if jerr != nil {
		return jerr
	}
	if _, werr := w.Write(append(line, '\n')); werr != nil || err != nil {
		return werr
	}
	return writeBody(w, resp.Body)
}

func writeBody(w io.Writer, body io.Reader) error {
	buf := make([]byte, 4+maxPiece)
	for {
		n, err := body.Read(buf[4:])
		if n > 0 {
			binary.BigEndian.PutUint32(buf, uint32(n))
			if _, werr := w.Write(buf[:4+n]); werr != nil {
				return werr
			}
		}
		switch {
		case err == io.EOF:
			_, werr := w.Write(make([]byte, 4))
			return werr
		case err != nil:
			said := err.Error()
			tail := append(binary.BigEndian.AppendUint32(nil, broken), said[:min(len(said), maxAnswer)]...)
			_, werr := w.Write(tail)
			return werr
		}
	}
}

// ReadAnswer reads what WriteAnswer sent. An error of the request is an *[Error].
func ReadAnswer(r io.ReadCloser) (*Response, error) {
	br := bufio.NewReaderSize(r, maxAnswer)
	line, err := br.ReadSlice('\n')
	if err != nil {
		return nil, ended(err)
	}
	var a answer
	if err := json.Unmarshal(line, &a); err != nil {
		return nil, fmt.Errorf("msb-fetch: %w", err)
	}
	if a.Error != nil {
		return nil, a.Error
	}
	return &Response{Start: a.Start, Body: &body{r: br, c: r}}, nil
}

// ended turns the end of msb-fetch into an error.
func ended(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// body is the body of an answer.
type body struct {
	r    *bufio.Reader
	c    io.Closer
	left uint32 // of the present piece
	err  error
}

func (b *body) Read(p []byte) (int, error) {
	if b.left == 0 && b.err == nil {
		b.next()
	}
	if b.err != nil {
		return 0, b.err
	}
	n, err := b.r.Read(p[:min(len(p), int(b.left))])
	b.left -= uint32(n)
	if err != nil {
		b.err = ended(err)
	}
	return n, b.err
}

// next reads the length of the next piece.
func (b *body) next() {
	var head [4]byte
	if _, err := io.ReadFull(b.r, head[:]); err != nil {
		b.err = ended(err)
		return
	}
	switch n := binary.BigEndian.Uint32(head[:]); {
	case n == 0:
		b.err = io.EOF
	case n == broken:
		said, err := io.ReadAll(io.LimitReader(b.r, maxAnswer))
		b.err = errors.Join(errors.New(string(said)), err)
	case n > maxPiece:
		b.err = fmt.Errorf("msb-fetch: piece of %d bytes", n)
	default:
		b.left = n
	}
}

func (b *body) Close() error { return b.c.Close() }
