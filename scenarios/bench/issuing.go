package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/signer"
	"github.com/entente-mesh/entente/meshagent/nodeattest"
)

const (
	callers = 32
	hosts   = 8 // that the callers are spread over: a host may have 5,000 tokens a second
)

// measureIssuing asks one CA node for SVIDs as attested hosts do, with keys and requests
// made beforehand.
func measureIssuing(ctx context.Context, b *bench) error {
	b.say("issuing: %d callers on %d hosts", callers, hosts)
	d, err := b.domain(ctx, 1)
	if err != nil {
		return err
	}
	defer d.close()

	doors := make([]ententev1.SignClient, hosts)
	for i := range doors {
		host := fmt.Sprintf("h%d", i)
		if err := d.nodes[0].change(ctx, create(entry("issue-"+host, host))); err != nil {
			return err
		}
		s, err := d.admit(ctx, host)
		if err != nil {
			return err
		}
		conn, err := s.dial()
		if err != nil {
			return err
		}
		defer conn.Close()
		doors[i] = ententev1.NewSignClient(conn)
	}
	csrs := make([][]byte, 256)
	for i := range csrs {
		key, err := nodeattest.NewKey()
		if err != nil {
			return err
		}
		if csrs[i], err = nodeattest.CSR(key); err != nil {
			return err
		}
	}

	for _, m := range []struct {
		name string
		each int // items of one call
		call func(ctx context.Context, caller, n int) error
	}{
		{"x509_single_cpu_us", 1, func(ctx context.Context, caller, n int) error {
			return signX509(ctx, doors[caller%hosts], caller%hosts, csrs, n, 1)
		}},
		{"x509_batch100_cpu_us", 100, func(ctx context.Context, caller, n int) error {
			return signX509(ctx, doors[caller%hosts], caller%hosts, csrs, n, 100)
		}},
		{"jwt_cpu_us", 1, func(ctx context.Context, caller, n int) error {
			answer, err := doors[caller%hosts].SignJWT(ctx, &ententev1.SignJWTRequest{Requests: []*ententev1.JWTRequest{{
				EntryId: fmt.Sprintf("entry/issue-h%d", caller%hosts), Audience: []string{fmt.Sprintf("https://%d.example", n)},
			}}})
			if err != nil {
				return err
			}
			return refused(answer.GetResults()[0])
		}},
	} {
		if !b.wants(m.name) {
			continue
		}
		// Once without looking, so that the process has grown to its size.
		if _, _, err := drive(ctx, b.while()/4, m.call); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		before, err := d.nodes[0].cpu()
		if err != nil {
			return err
		}
		calls, took, err := drive(ctx, b.while(), m.call)
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		after, err := d.nodes[0].cpu()
		if err != nil {
			return err
		}
		if err := b.verify(); err != nil {
			return err
		}
		b.reportIssuing(m.name, after-before, calls*m.each, took)
	}
	return nil
}

// reportIssuing reports what SVIDs cost, also in verifications, in which machines can be
// compared.
func (b *bench) reportIssuing(name string, cpu time.Duration, n int, took time.Duration) {
	each, speed := perItem(cpu, n), b.verifyUS[len(b.verifyUS)-1]
	l, _ := b.suite.line(name)
	b.report(name, each, n, "%.0f/s; clients share the machine, on which a verification took %.0f us then (SPIRE's: %.1f), so it is %.1f of those (target: %.1f, SPIRE's: %.1f); audit log on",
		float64(n)/took.Seconds(), speed, referenceVerifyUS, each/speed, l.target/referenceVerifyUS, l.peer/referenceVerifyUS)
}

func signX509(ctx context.Context, door ententev1.SignClient, host int, csrs [][]byte, from, n int) error {
	request := &ententev1.SignX509Request{Requests: make([]*ententev1.X509Request, n)}
	for i := range request.Requests {
		request.Requests[i] = &ententev1.X509Request{EntryId: fmt.Sprintf("entry/issue-h%d", host), Csr: csrs[(from*n+i)%len(csrs)]}
	}
	answer, err := door.SignX509(ctx, request)
	if err != nil {
		return err
	}
	for _, r := range answer.GetResults() {
		if err := refused(r); err != nil {
			return err
		}
	}
	return nil
}

// errBusy: the CA node has more to do than it takes on.
var errBusy = errors.New("the CA node is busy")

// refused is what an item of a batch says that is not an SVID.
func refused(r interface {
	GetCode() uint32
	GetError() string
}) error {
	switch codes.Code(r.GetCode()) {
	case codes.OK:
		return nil
	case codes.ResourceExhausted:
		return errBusy
	}
	return errors.New(r.GetError())
}

// drive has the callers call for some time, each one call after the other. n of a call
// is its number among all.
func drive(ctx context.Context, d time.Duration, call func(ctx context.Context, caller, n int) error) (calls int, took time.Duration, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var done, next atomic.Int64
	var all sync.WaitGroup
	began := time.Now()
	for caller := range callers {
		all.Go(func() {
			for time.Since(began) < d && ctx.Err() == nil {
				switch err := call(ctx, caller, int(next.Add(1))); {
				case err == nil:
					done.Add(1)
				case errors.Is(err, errBusy):
					sleep(ctx, signer.RetryAfter) // as it asks for
				default:
					cancel(err)
					return
				}
			}
		})
	}
	all.Wait()
	return int(done.Load()), time.Since(began), context.Cause(ctx)
}
