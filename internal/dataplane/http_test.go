package dataplane

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/entente-mesh/entente/internal/dataplane/header"
)

// h2c is a client that speaks HTTP/2 to the loopback door, as gRPC does.
func h2c(t *testing.T) *http.Client {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: p}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 20 * time.Second}
}

// A gRPC-shaped stream in both directions at once, with trailers, over four hops.
func TestBidirectionalStream(t *testing.T) {
	w := newWorld(t)
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 || r.Header.Get("Te") != "trailers" {
			t.Errorf("the application got %s, TE %q", r.Proto, r.Header.Get("Te"))
		}
		rw.Header().Set("Content-Type", "application/grpc")
		rw.Header().Set("Trailer", "Grpc-Status")
		lines := bufio.NewScanner(r.Body)
		for lines.Scan() {
			fmt.Fprintf(rw, "echo %s\n", lines.Text())
			_ = http.NewResponseController(rw).Flush()
		}
		rw.Header().Set("Grpc-Status", "0")
		rw.Header().Set(http.TrailerPrefix+"Grpc-Message", "done")
	})
	w.banking.apps[0].handler.Store(&h)
	body, feed := io.Pipe()
	r, _ := http.NewRequest("POST", w.trading.outURL[0]+"/v1/Echo", body)
	r.Host = "accounts.banking.example"
	r.Header.Set("Content-Type", "application/grpc")
	r.Header.Set("Te", "trailers")
	go func() { _, _ = io.WriteString(feed, "one\n") }()
	res, err := h2c(t).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	lines := bufio.NewReader(res.Body)
	for _, word := range []string{"one", "two", "three"} { // each is answered before the next is sent
		line, err := lines.ReadString('\n')
		if line != "echo "+word+"\n" || err != nil {
			t.Fatalf("%q, %v", line, err)
		}
		next := map[string]string{"one": "two\n", "two": "three\n"}[word]
		if next == "" {
			_ = feed.Close()
			break
		}
		_, _ = io.WriteString(feed, next)
	}
	if rest, err := io.ReadAll(lines); len(rest) > 0 || err != nil {
		t.Errorf("%q, %v", rest, err)
	}
	if res.Trailer.Get("Grpc-Status") != "0" || res.Trailer.Get("Grpc-Message") != "done" {
		t.Errorf("trailers: %v", res.Trailer)
	}
}

// A refusal that a gRPC client understands.
func TestGRPCRefusal(t *testing.T) {
	w := newWorld(t)
	a := do(t, h2c(t), "POST", w.trading.outURL[0]+"/v9/Echo", "accounts.banking.example", http.Header{"Content-Type": {"application/grpc"}}, strings.NewReader("x"))
	if a.StatusCode != 200 || a.Header.Get("Grpc-Status") != "7" || a.Header.Get(header.Refused) != "agreement-method" {
		t.Error(a)
	}
}

// A connection that is upgraded is a tunnel over all hops.
func TestUpgrade(t *testing.T) {
	w := newWorld(t)
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if header.Upgrade(r.Header) != "websocket" || r.Header.Get(header.ClientCert) == "" {
			t.Errorf("%v", r.Header)
			rw.WriteHeader(400)
			return
		}
		c, buffered, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-App: yes\r\n\r\n")
		line, _ := buffered.ReadString('\n')
		_, _ = io.WriteString(c, "echo "+line)
	})
	w.banking.apps[0].handler.Store(&h)
	c, err := net.Dial("tcp", w.trading.out[0].addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = io.WriteString(c, "GET /v1/live HTTP/1.1\r\nHost: accounts.banking.example\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n")
	in := bufio.NewReader(c)
	res, err := http.ReadResponse(in, nil)
	if err != nil || res.StatusCode != 101 || res.Header.Get("X-App") != "yes" {
		t.Fatal(res, err)
	}
	_, _ = io.WriteString(c, "hello\n")
	if line, err := in.ReadString('\n'); line != "echo hello\n" {
		t.Errorf("%q, %v", line, err)
	}
	if _, err := in.ReadByte(); err == nil {
		t.Error("the tunnel is open although the application closed")
	}
}

func TestBodies(t *testing.T) {
	w := newWorld(t)
	big := make([]byte, 3<<20)
	_, _ = rand.Read(big)
	echo := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.ContentLength > 0 {
			rw.Header().Set("Content-Length", fmt.Sprint(r.ContentLength))
		}
		_ = http.NewResponseController(rw).EnableFullDuplex()
		_, _ = io.Copy(rw, r.Body)
	})
	w.banking.apps[0].handler.Store(&echo)
	for name, body := range map[string]io.Reader{
		"known length":   bytes.NewReader(big),
		"unknown length": io.MultiReader(bytes.NewReader(big)),
		"one byte":       bytes.NewReader(big[:1]),
		"none":           nil,
		"slow":           iotest.OneByteReader(bytes.NewReader(big[:300])),
	} {
		want := map[string]int{"one byte": 1, "none": 0, "slow": 300}
		n, ok := want[name]
		if !ok {
			n = len(big)
		}
		a := do(t, client, "POST", w.trading.outURL[0]+"/v1/echo", "accounts.banking.example", http.Header{"Expect": {"100-continue"}}, body)
		if a.StatusCode != 200 || a.body != string(big[:n]) {
			t.Errorf("%s: %d, %d bytes", name, a.StatusCode, len(a.body))
		}
	}
	a := do(t, client, "HEAD", w.trading.outURL[0]+"/", "market.trading.example", nil, nil)
	if a.StatusCode != 200 || a.body != "" {
		t.Error(a)
	}
}

// An answer that breaks off must not look complete; a small one is asked for again.
func TestTruncation(t *testing.T) {
	w := newWorld(t)
	cut := func(length string) *http.HandlerFunc {
		h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if length != "" {
				rw.Header().Set("Content-Length", length)
			}
			_, _ = io.WriteString(rw, "half")
			_ = http.NewResponseController(rw).Flush()
			panic(http.ErrAbortHandler)
		})
		return &h
	}
	w.trading.apps[0].handler.Store(cut("1000000"))
	r, _ := http.NewRequest("GET", w.trading.outURL[0]+"/", nil)
	r.Host = "market.trading.example"
	res, err := client.Do(r)
	if err == nil {
		_, err = io.ReadAll(res.Body)
		_ = res.Body.Close()
	}
	if err == nil {
		t.Error("half an answer looks whole")
	}
	w.trading.apps[0].handler.Store(cut("8"))
	if a := get(t, w.trading.outURL[0], "market.trading.example", "/"); a.StatusCode != 200 || a.body != "ok" {
		t.Errorf("a small answer that broke off was not asked for elsewhere: %v", a)
	}
}

// What net/http and we refuse before anything is sent.
func TestMalformed(t *testing.T) {
	w := newWorld(t)
	for name, request := range map[string]string{
		"two lengths":         "POST / HTTP/1.1\r\nHost: market.trading.example\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
		"obsolete folding":    "GET / HTTP/1.1\r\nHost: market.trading.example\r\n X: y\r\n\r\n",
		"space before colon":  "GET / HTTP/1.1\r\nHost: market.trading.example\r\nEntente-Caller : x\r\n\r\n",
		"two hosts":           "GET / HTTP/1.1\r\nHost: market.trading.example\r\nHost: accounts.banking.example\r\n\r\n",
		"strange encoding":    "POST / HTTP/1.1\r\nHost: market.trading.example\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
		"tunnel":              "CONNECT market.trading.example:80 HTTP/1.1\r\nHost: market.trading.example:80\r\n\r\n",
		"other absolute form": "GET http://nobody.example/ HTTP/1.1\r\nHost: market.trading.example\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			before := w.trading.apps[0].served.Load()
			c, err := net.Dial("tcp", w.trading.out[0].addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			_, _ = io.WriteString(c, request)
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil || res.StatusCode < 400 {
				t.Errorf("%v, %v", res, err)
			}
			if w.trading.apps[0].served.Load() != before {
				t.Error("it reached the application")
			}
		})
	}
}

// The texts of net/http that neverProcessed looks for are those of this Go.
func TestGoAwayText(t *testing.T) {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	// A server that answers the first stream's HEADERS by a GOAWAY that does not cover it.
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = c.Write([]byte{0, 0, 0, 4, 0, 0, 0, 0, 0}) // SETTINGS
		buffer := make([]byte, 4096)
		for headers := false; !headers; {
			n, err := c.Read(buffer)
			if err != nil {
				return
			}
			headers = bytes.Contains(buffer[:n], []byte{1, 5, 0, 0, 0, 1}) // HEADERS, END_STREAM|END_HEADERS, stream 1
		}
		_, _ = c.Write([]byte{0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}) // GOAWAY, last stream 0, NO_ERROR
		_, _ = io.Copy(io.Discard, c)
	}()
	transport := &http.Transport{Protocols: p}
	cc, err := transport.NewClientConn(context.Background(), "http", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	r, _ := http.NewRequest("GET", "http://"+ln.Addr().String()+"/", nil)
	_, err = cc.RoundTrip(r)
	if err == nil || !neverProcessed(err) {
		t.Errorf("not recognised: %v", err)
	}
	if neverProcessed(errors.New("unexpected EOF")) {
		t.Error("a lost connection says nothing of the kind")
	}
	_ = cc.Close()
	_ = ln.Close()
	<-done
}

// A body that two attempts read, the first of which still hangs.
func TestSource(t *testing.T) {
	pipe, feed := io.Pipe()
	s := newSource(pipe, func() http.Header { return http.Header{"X-Sum": {"1"}} })
	first := s.next(nil)
	var hanging sync.WaitGroup
	hanging.Go(func() { _, _ = feed.Write([]byte("hello")) })
	if n, err := first.Read(make([]byte, 10)); n != 5 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	hanging.Go(func() {
		if _, err := first.Read(make([]byte, 10)); err != errAttemptOver {
			t.Errorf("the first attempt goes on: %v", err)
		}
	})
	for reading := false; !reading; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		reading = s.pulling
		s.mu.Unlock()
	}
	trailer := http.Header{"X-Sum": nil}
	second := s.next(trailer)
	hanging.Go(func() {
		_, _ = feed.Write([]byte(" world"))
		_ = feed.Close()
	})
	all, err := io.ReadAll(second)
	if string(all) != "hello world" || err != nil || trailer.Get("X-Sum") != "1" || !s.replayable() {
		t.Errorf("%q, %v, %v", all, err, trailer)
	}
	hanging.Wait()
	if all, err := io.ReadAll(s.next(nil)); string(all) != "hello world" || err != nil {
		t.Errorf("the third: %q, %v", all, err)
	}

	s = newSource(bytes.NewReader(make([]byte, maxReplay+1)), func() http.Header { return nil })
	if n, err := io.Copy(io.Discard, s.next(nil)); n != maxReplay+1 || err != nil || s.replayable() {
		t.Errorf("%d, %v, replayable %v", n, err, s.replayable())
	}
}
