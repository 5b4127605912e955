package agentclient

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"strings"
	"syscall"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Do runs one file operation that moves no data and returns its answer.
func (c *Conn) Do(ctx context.Context, op agentproto.FSOp) (*agentproto.FSData, error) {
	if err := c.request(ctx, op); err != nil {
		return nil, err
	}
	defer interrupt(ctx, c.conn)()
	for {
		m, err := c.receive()
		if err != nil {
			return nil, lost(ctx, err)
		}
		if m.kind == agentproto.MsgFSData {
			continue // of an operation whose data nobody wants
		}
		return answer(m)
	}
}

func (c *Conn) request(ctx context.Context, op agentproto.FSOp) error {
	if err := c.next(); err != nil {
		return err
	}
	defer interrupt(ctx, c.conn)()
	if err := c.send(agentproto.MsgFSRequest, agentproto.FlagSessionStart, agentproto.FSRequest{Op: op}); err != nil {
		return lost(ctx, err)
	}
	return nil
}

// answer decodes a terminal frame of a file operation.
func answer(m message) (*agentproto.FSData, error) {
	switch m.kind {
	case agentproto.MsgFSResponse:
		var r agentproto.FSResponse
		if err := agentproto.Unmarshal(m.payload, &r); err != nil {
			return nil, err
		}
		if !r.OK {
			return nil, fsError(&r)
		}
		if r.Data == nil {
			return &agentproto.FSData{}, nil
		}
		return r.Data, nil
	case agentproto.MsgError:
		return nil, refused(m.payload)
	}
	return nil, errdefs.New(errdefs.Internal, "guest agent answered a file request with %q", m.kind)
}

func fsError(r *agentproto.FSResponse) error {
	msg := "file operation failed"
	if r.Error != nil {
		msg = *r.Error
	}
	if r.Errno == nil {
		return errdefs.New(errdefs.Filesystem, "%s", msg)
	}
	// The agent's message mostly ends with the errno's text, which the cause adds.
	errno := syscall.Errno(*r.Errno)
	if msg == errno.Error() {
		msg = ""
	}
	return errdefs.Wrap(errdefs.Filesystem, errno, "%s", strings.TrimSuffix(msg, ": "+errno.Error()))
}

// ReadStream yields a guest file's bytes.
type ReadStream struct {
	c      *Conn
	handle uint64
	end    bool
}

// OpenRead opens a guest file for reading over the connection, which belongs to
// the stream from then on.
func (c *Conn) OpenRead(ctx context.Context, path string) (*ReadStream, error) {
	d, err := c.Do(ctx, agentproto.FSOp{OpenFile: &agentproto.FSOpenFile{Path: path, Options: agentproto.FSOpenOptions{Read: true}}})
	if err != nil {
		return nil, err
	}
	if d.Handle == nil {
		return nil, errdefs.New(errdefs.Internal, "guest agent gave no handle for %s", path)
	}
	s := &ReadStream{c: c, handle: *d.Handle}
	return s, c.request(ctx, agentproto.FSOp{Read: &agentproto.FSTransfer{Handle: s.handle}})
}

// Recv returns the next chunk, nil at the end.
func (s *ReadStream) Recv(ctx context.Context) ([]byte, error) {
	if s.end {
		return nil, nil
	}
	defer interrupt(ctx, s.c.conn)()
	for {
		m, err := s.c.receive()
		if err != nil {
			return nil, lost(ctx, err)
		}
		if m.kind != agentproto.MsgFSData {
			s.end = true
			_, err := answer(m)
			return nil, err
		}
		data, err := agentproto.DecodeData(m.payload)
		if err != nil {
			return nil, err
		}
		if len(data) > 0 {
			return data, nil
		}
	}
}

// Close ends the stream; the guest closes its handle. It is idempotent.
func (s *ReadStream) Close() error {
	s.end = true
	if err := s.c.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// WriteStream sends bytes into a guest file.
type WriteStream struct {
	c      *Conn
	handle uint64
	closed bool
}

// OpenWrite creates or truncates a guest file and opens it for writing over the
// connection, which belongs to the stream from then on. A mode is set exactly.
func (c *Conn) OpenWrite(ctx context.Context, path string, mode *uint32) (*WriteStream, error) {
	o := agentproto.FSOpenOptions{Write: true, Create: true, Truncate: true, Mode: mode}
	d, err := c.Do(ctx, agentproto.FSOp{OpenFile: &agentproto.FSOpenFile{Path: path, Options: o}})
	if err != nil {
		return nil, err
	}
	if d.Handle == nil {
		return nil, errdefs.New(errdefs.Internal, "guest agent gave no handle for %s", path)
	}
	s := &WriteStream{c: c, handle: *d.Handle}
	if mode != nil { // the open's mode is cut by a umask, and means nothing if the file is there
		set := agentproto.FSetStatByFD{Handle: s.handle, Attrs: agentproto.FSAttrs{Mode: mode}}
		if _, err := c.Do(ctx, agentproto.FSOp{FSetStat: &set}); err != nil {
			return nil, err
		}
	}
	return s, c.request(ctx, agentproto.FSOp{Write: &agentproto.FSTransfer{Handle: s.handle}})
}

// Write sends a chunk; it blocks while the guest does not take it. A failure in
// the guest, a full disk for instance, is reported by Close.
func (s *WriteStream) Write(ctx context.Context, p []byte) (int, error) {
	if s.closed {
		return 0, fs.ErrClosed
	}
	if len(p) == 0 {
		return 0, nil
	}
	defer interrupt(ctx, s.c.conn)()
	if err := s.c.sendData(agentproto.MsgFSData, p); err != nil {
		return 0, lost(ctx, err)
	}
	return len(p), nil
}

// Close ends the file and returns what the guest says of it.
func (s *WriteStream) Close(ctx context.Context) error {
	if s.closed {
		return nil
	}
	s.closed = true
	defer s.c.Close()
	defer interrupt(ctx, s.c.conn)()
	if err := s.c.sendData(agentproto.MsgFSData, nil); err != nil {
		return lost(ctx, err)
	}
	m, err := s.c.receive()
	if err != nil {
		return lost(ctx, err)
	}
	if _, err := answer(m); err != nil {
		return err
	}
	_, err = s.c.Do(ctx, agentproto.FSOp{CloseHandle: &agentproto.FSHandle{Handle: s.handle}})
	return err
}

// Abort ends the stream without an end of file; what was written stays.
func (s *WriteStream) Abort() error {
	s.closed = true
	return s.c.Close()
}

// ReadAll reads a whole guest file of at most limit bytes.
func (c *Conn) ReadAll(ctx context.Context, path string, limit int64) ([]byte, error) {
	s, err := c.OpenRead(ctx, path)
	if err != nil {
		return nil, err
	}
	var out []byte
	for {
		b, err := s.Recv(ctx)
		if err != nil {
			return nil, err
		}
		if b == nil {
			return out, nil
		}
		if int64(len(out)+len(b)) > limit {
			return nil, errdefs.Wrap(errdefs.Filesystem, errors.Join(syscall.EFBIG, io.ErrShortBuffer), "%s is larger than %d bytes", path, limit)
		}
		out = append(out, b...)
	}
}
