package dataplane

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/entente-mesh/entente/internal/dataplane/header"
	"github.com/entente-mesh/entente/internal/refusal"
)

// tunnel joins client and upstream after a 101: from here on bytes are only carried.
func (s *sender) tunnel(res *http.Response) {
	x := s.x
	upstream, ok := res.Body.(io.ReadWriteCloser)
	if protocol := header.Upgrade(res.Header); !ok || x.upgrade == "" || !strings.EqualFold(protocol, x.upgrade) {
		x.refuse(refusal.UpstreamOutcomeUnknown, "The service switched to a protocol nobody asked for.", "")
		return
	}
	header.RemoveHop(res.Header)
	header.RemoveProtected(res.Header)
	x.toUser(res.Header)
	answer := http.Response{StatusCode: http.StatusSwitchingProtocols, ProtoMajor: 1, ProtoMinor: 1, Header: x.w.Header()}
	for name, values := range res.Header {
		answer.Header[name] = values
	}
	answer.Header["Connection"], answer.Header["Upgrade"] = []string{"Upgrade"}, []string{x.upgrade}
	answer.Header[header.RequestID] = []string{x.record.requestID}
	// Taken over before the answer is written: a client that has it may end its half at
	// once, which the server would take for the end of the request.
	client, buffered, err := http.NewResponseController(x.w).Hijack()
	if err != nil {
		x.gone()
		return
	}
	x.begun = true
	x.record.outcome = outcomeAnswered
	defer client.Close()
	if d, _ := x.r.Context().Value(downstreamKey{}).(*downstream); d != nil {
		defer d.untrack()
	}
	if err := errors.Join(answer.Write(buffered), buffered.Flush()); err != nil {
		return
	}
	// Not through buffered: at the end of what comes it would cancel the request's context.
	early, _ := buffered.Peek(buffered.Reader.Buffered())
	sent := io.MultiReader(bytes.NewReader(early), client)
	hangUp := func() {
		_ = client.Close()
		_ = upstream.Close()
	}
	if x.tcp {
		hangUp = func() {
			reset(client)
			s.reset()
		}
	}
	defer context.AfterFunc(x.engine.ctx, hangUp)() // the process stops
	defer context.AfterFunc(s.ctx, hangUp)()        // no longer allowed

	half := time.AfterFunc(halfClosed, hangUp)
	half.Stop()
	defer half.Stop()

	var both sync.WaitGroup
	both.Add(2)
	carry := func(to io.Writer, from io.Reader) {
		defer both.Done()
		_, err := io.Copy(to, from)
		if x.tcp && err == nil && closeWrite(to) == nil {
			half.Reset(halfClosed)
			return
		}
		hangUp() // either end ends both
	}
	go carry(upstream, sent)
	go carry(client, upstream)
	both.Wait()
	var cut *revoked
	if errors.As(context.Cause(s.ctx), &cut) {
		x.record.outcome, x.record.reason = outcomeCut, cut.Reason
	}
}
