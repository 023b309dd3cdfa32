package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/peer"
)

// A door that closes answers what it has taken: no connection is closed in the face of
// its first request. (One that the kernel still held is reset, which is another error.)
func TestDrainAnswersFreshConnections(t *testing.T) {
	e := &Engine{cfg: Config{Timing: Timing{Drain: 5 * time.Second}}}
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(time.Millisecond)
		io.WriteString(w, "hello")
	})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	answered := 0
	for range 40 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		closed := make(chan error, 1)
		go func() {
			closed <- e.serve(ctx, newGate(ln, func(c net.Conn) (net.Conn, error) { return c, nil }), false, func() *http.Server { return &http.Server{Handler: handler} })
		}()
		var callers sync.WaitGroup
		var mu sync.Mutex
		for range 4 {
			callers.Go(func() {
				for {
					response, err := client.Get("http://" + ln.Addr().String())
					if errors.Is(err, io.EOF) {
						t.Error("a connection was closed before its request was answered")
					}
					if err != nil {
						return
					}
					response.Body.Close()
					mu.Lock()
					answered++
					mu.Unlock()
				}
			})
		}
		time.Sleep(10 * time.Millisecond)
		stop()
		if err := <-closed; err != nil {
			t.Error(err)
		}
		callers.Wait()
	}
	if answered < 40 {
		t.Errorf("control: %d requests were answered", answered)
	}
}

// A gateway that an operator drains loses no request, of either version of HTTP: peers go
// to another one, and come back when it takes connections again.
func TestDrainAndUndrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, inMemory)
		gw := w.banking.gateways[0]
		var shown SeenListener
		served := func() int64 { return w.banking.apps[0].served.Load() }
		during(t, w, 10*time.Millisecond, func() {
			if first := gw.Drain(Drained{Who: "a"}); first.Who != "a" {
				t.Errorf("drained by %v", first)
			}
			if second := gw.Drain(Drained{Who: "b"}); second.Who != "a" {
				t.Errorf("the second one to ask is told that %v drained it", second)
			}
			time.Sleep(3 * time.Second)
			shown = gw.Seen(catalog.Gateway).Listeners[0]
			before := served()
			time.Sleep(time.Second)
			if after := served(); after != before || before == 0 {
				t.Errorf("%d requests came through a drained gateway, %d before", after-before, before)
			}
			if !gw.Undrain() || gw.Undrain() || gw.Drained() != nil {
				t.Error("undrained once")
			}
			time.Sleep(5 * time.Second) // probe, then the hold time
			if after := served(); after == before {
				t.Error("it takes connections again, and nobody came back")
			}
		})
		if shown.Connections != 0 || shown.Name != "eastWest" {
			t.Errorf("drained, and its listener has %d connections", shown.Connections)
		}
		if w.banking.apps[1].served.Load() == 0 {
			t.Error("dc2 was never asked: nothing was drained")
		}
	})
}

// Drain waits for what is under way as long as it takes, and the end of the process only
// for its bound.
func TestDrainIsPatient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, inMemory)
		gw := w.banking.gateways[0]
		slow := make(chan struct{})
		h := http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
			rw.WriteHeader(http.StatusOK)
			rw.(http.Flusher).Flush()
			<-slow
			_, _ = io.WriteString(rw, "late")
		})
		w.banking.apps[0].handler.Store(&h)
		bodies := make(chan string, 2)
		ask := func() {
			r, _ := http.NewRequest("GET", w.trading.outURL[0]+"/v1/balance", nil)
			r.Host = "accounts.banking.example"
			res, err := w.client().Do(r)
			if err != nil {
				bodies <- err.Error()
				return
			}
			body, err := io.ReadAll(res.Body)
			bodies <- fmt.Sprint(string(body), err)
		}
		go ask()
		time.Sleep(time.Second)
		gw.Drain(Drained{})
		time.Sleep(time.Hour / 2)
		if n := gw.Seen(catalog.Gateway).Listeners[0].Connections; n != 1 {
			t.Errorf("%d connections while a request is under way", n)
		}
		close(slow)
		if got := <-bodies; got != "late<nil>" {
			t.Errorf("a request under way: %s", got)
		}
		time.Sleep(3 * time.Second)
		if n := gw.Seen(catalog.Gateway).Listeners[0].Connections; n != 0 {
			t.Errorf("%d connections after the last request", n)
		}

		gw.Undrain()
		slow = make(chan struct{})
		time.Sleep(time.Minute)
		go ask()
		time.Sleep(time.Second)
		gw.Drain(Drained{})
		time.Sleep(time.Minute)
		if len(bodies) > 0 {
			t.Errorf("control: %s", <-bodies)
		}
		gw.cancelDoor()
		time.Sleep(11 * time.Second) // Timing.Drain
		if len(bodies) != 1 {
			t.Error("the process does not end while it is drained")
		}
		close(slow)
	})
}

// Requests over HTTP/1.1 are not lost either: no connection is closed that its caller may
// be about to use, while it asks more often than once in a second.
func TestDrainSaysGoodbyeToHTTP1(t *testing.T) {
	w := newWorld(t)
	gw := w.banking.gateways[0]
	config := peer.ClientTLS(w.svid(w.banking, "/ledger"), w.banking.own, peer.AnyVerified(), "http/1.1")
	config.ServerName = banking.Name()
	transport := &http.Transport{TLSClientConfig: config}
	defer transport.CloseIdleConnections()
	c := &http.Client{Transport: transport}
	ask := func() (closes bool, err error) {
		r, _ := http.NewRequest("POST", "https://"+gw.addr+"/v1", strings.NewReader("x"))
		r.Host = "accounts.banking.example"
		res, err := c.Do(r)
		if err != nil {
			return false, err
		}
		defer res.Body.Close()
		_, err = io.ReadAll(res.Body)
		if res.ProtoMajor != 1 || res.StatusCode != 200 {
			err = fmt.Errorf("%s %s", res.Proto, res.Status)
		}
		return res.Close, err
	}
	if closes, err := ask(); closes || err != nil {
		t.Fatalf("control: %v, %v", closes, err)
	}
	gw.Drain(Drained{})
	if closes, err := ask(); !closes || err != nil {
		t.Errorf("on a connection of a drained gateway: %v, %v", closes, err)
	}
	if _, err := ask(); err == nil {
		t.Error("a drained gateway took a new connection")
	}
	gw.Undrain()
	if closes, err := ask(); closes || err != nil {
		t.Errorf("undrained: %v, %v", closes, err)
	}
}
