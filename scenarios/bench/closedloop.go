package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/entente-mesh/entente/scenarios/process"
)

// ask is a load of requests over HTTP/1.1: each connection sends the next one when it has
// the answer, or when its time has come.
type ask struct {
	address     string
	request     string
	connections int
	every       time.Duration // between two of one connection; 0: at once
	fresh       *tls.Config   // not nil: each request on a new mTLS connection of its own
}

func get(path string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: " + callee + "\r\nUser-Agent: bench\r\nAccept: */*\r\nAccept-Encoding: identity\r\nAccept-Language: en\r\nX-Request-Source: bench\r\nCache-Control: no-cache\r\n\r\n"
}

func post(body string) string {
	return fmt.Sprintf("POST / HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n%s", callee, len(body), body)
}

// asked is what a load did.
type asked struct {
	took  []time.Duration // of each request, from when it was to be sent
	bytes int64
	wall  time.Duration
	cpu   []time.Duration // of each process that was looked at
}

func (a asked) perSecond() float64 { return float64(len(a.took)) / a.wall.Seconds() }

// cpuOf is the processor time per request of some of the processes, in microseconds.
func (a asked) cpuOf(from, to int) float64 {
	var all time.Duration
	for _, used := range a.cpu[from:to] {
		all += used
	}
	return perItem(all, len(a.took))
}

// run keeps the load up for so long and looks at what it costs the processes.
func (k ask) run(ctx context.Context, d time.Duration, hops []*process.Process) (asked, error) {
	before, err := cpuOfAll(hops)
	if err != nil {
		return asked{}, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex
	var all sync.WaitGroup
	var sum asked
	began := time.Now()
	for i := range k.connections {
		all.Go(func() {
			one, err := k.connection(ctx, began.Add(k.every*time.Duration(i)/time.Duration(k.connections)), began.Add(d))
			if err != nil {
				cancel(err)
			}
			mu.Lock()
			defer mu.Unlock()
			sum.took, sum.bytes = append(sum.took, one.took...), sum.bytes+one.bytes
		})
	}
	all.Wait()
	sum.wall = time.Since(began)
	if err := context.Cause(ctx); err != nil {
		return asked{}, err
	}
	after, err := cpuOfAll(hops)
	if err != nil {
		return asked{}, err
	}
	for i := range hops {
		sum.cpu = append(sum.cpu, after[i]-before[i])
	}
	if len(sum.took) == 0 {
		return asked{}, errors.New("no request was answered in time")
	}
	return sum, nil
}

func cpuOfAll(hops []*process.Process) ([]time.Duration, error) {
	used := make([]time.Duration, len(hops))
	for i, p := range hops {
		var err error
		if used[i], err = process.CPUOf(p.PID()); err != nil {
			return nil, err
		}
	}
	return used, nil
}

// connection sends one request after the other until the end.
func (k ask) connection(ctx context.Context, due, end time.Time) (one asked, err error) {
	var c *answers
	defer func() {
		if c != nil {
			c.Close()
		}
	}()
	for due.Before(end) && ctx.Err() == nil {
		if k.every == 0 {
			due = time.Now()
		} else if sleep(ctx, time.Until(due)) != nil {
			break
		}
		if c == nil {
			if c, err = k.dial(ctx); err != nil {
				return one, err
			}
		}
		n, last, err := c.ask(k.request)
		if err != nil {
			return one, err
		}
		one.took, one.bytes = append(one.took, time.Since(due)), one.bytes+n
		if last || k.fresh != nil {
			c.Close()
			c = nil
		}
		due = due.Add(k.every)
		if k.every == 0 {
			due = time.Now()
		}
	}
	return one, nil
}

// answers is a connection on which requests are answered.
type answers struct {
	net.Conn
	read *bufio.Reader
}

const answerIn = 30 * time.Second

func (k ask) dial(ctx context.Context) (*answers, error) {
	conn, err := (&net.Dialer{Timeout: answerIn}).DialContext(ctx, "tcp", k.address)
	if err != nil {
		return nil, err
	}
	if k.fresh != nil {
		secure := tls.Client(conn, k.fresh)
		if err := secure.HandshakeContext(ctx); err != nil {
			conn.Close()
			return nil, err
		}
		conn = secure
	}
	return &answers{conn, bufio.NewReaderSize(conn, 64<<10)}, nil
}

// ask sends a request and takes the whole answer in. last: the connection is at its end.
func (c *answers) ask(request string) (n int64, last bool, err error) {
	c.SetDeadline(time.Now().Add(answerIn))
	if _, err := io.WriteString(c, request); err != nil {
		return 0, false, err
	}
	answer, err := http.ReadResponse(c.read, nil)
	if err != nil {
		return 0, false, err
	}
	defer answer.Body.Close()
	n, err = io.Copy(io.Discard, answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("answered %s, %s", answer.Status, answer.Header.Get("Entente-Refused"))
	}
	return n, answer.Close, err
}
